"""One training by several processes: what each takes of a batch, what they tell each other, how they end together.

Each holds the whole model and takes its share of every batch; the sum of their gradients is the whole batch's. The
first of them is the training: it writes, draws and decides, and has the run's folder, its signals and its exit code.
On one machine it starts the others itself; on several, `accelerate launch` starts all of them.

    python -m trainer.processes FOLDER      one of the others; its settings come through standard input
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.events import Failed
from trainer.run import EXIT_FAILED, REQUESTS, Run, write_whole

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
PATIENCE = timedelta(days=30)
"""How long one waits for another, which may be drawing or saving. That one has died is found out otherwise."""
CAUSE_COMES_WITHIN_S = 5.0
ENDS_WITHIN_S = 30.0


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, counted from 0."""

    rank: int = 0
    count: int = 1

    def share(self, images: int) -> range:
        """The places in a batch that are this process's: shares differ by one at most, the first are the larger."""
        small, more = divmod(images, self.count)
        start = self.rank * small + min(self.rank, more)
        return range(start, start + small + (self.rank < more))


ALONE = Place()


def here() -> Place:
    """This process's place, by the names that accelerate's and torch's launchers give it in the environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names):
        return ALONE
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


class Team:
    """What the processes of a training do together. Every method is called by all of them, at the same point.

    What goes between the hosts takes a group of its own, so that no device waits for it.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.hosts: Any = None
        if place.count > 1:
            from torch import distributed

            self.hosts = distributed.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def leads(self) -> bool:
        return self.place.rank == 0

    def told(self, value: T) -> T:
        """What the first process has there."""
        if self.place.count == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def asked(self, words: set[str]) -> set[str]:
        """What was asked of any of them."""
        if self.place.count == 1:
            return words
        import torch

        flags = torch.tensor([word in words for word in REQUESTS], dtype=torch.uint8)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.hosts)
        return {word for word, flag in zip(REQUESTS, flags.tolist(), strict=True) if flag}

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Those items that are this process's work."""
        return items[self.place.rank :: self.place.count]

    def gathered(self, done: list[T]) -> list[T]:
        """What all of them made of `mine`, in the items' order."""
        if self.place.count == 1:
            return done
        from torch import distributed

        parts: list[list[T]] = [[]] * self.place.count
        distributed.all_gather_object(parts, done, group=self.hosts)
        return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]

    def sum(self, parameters: Iterable[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Put the sum of all their gradients into each one's, and return that of their losses.

        One buffer in float32 goes around: that sums fp16 gradients without overflow, and is fastest. A tensor that has
        a gradient in none of them (a unit or a part that rests) is not sent, and keeps none.
        """
        if self.place.count == 1:
            return loss
        import torch

        trained = [p for p in parameters if p.requires_grad]
        present = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8)
        torch.distributed.all_reduce(present, torch.distributed.ReduceOp.MAX, group=self.hosts)
        trained = [p for p, anywhere in zip(trained, present.tolist(), strict=True) if anywhere]
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([*(p.grad.float().flatten() for p in trained), loss.float().view(1)])  # type: ignore[union-attr]
        torch.distributed.all_reduce(flat)
        *sums, total = flat.split([*(p.numel() for p in trained), 1])
        for p, gradient in zip(trained, sums, strict=True):
            p.grad.copy_(gradient.view_as(p))  # type: ignore[union-attr]
        return total[0]


def leave() -> None:
    """Leave the others, if this process is with any."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class Followers:
    """The other processes, as far as this one has started them."""

    def __init__(self, run: Run, count: int = 1) -> None:
        self.run = run
        self.count = count
        self.ended: dict[int, int] = {}
        """Exit codes, by rank."""
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._over = threading.Event()

    def start(self, settings: Mapping[str, Any], lost: Callable[[Failed | None], None]) -> None:
        """Start them; for `lost` see `followed`."""
        root = str(Path(__file__).parent.parent)
        for rank in range(1, self.count):
            paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "trainer.processes", str(self.run.folder)],
                stdin=subprocess.PIPE,
                env={**os.environ, **place, "PYTHONPATH": paths},
            )
            self._processes[rank] = process
            assert process.stdin
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()  # and it stays open: its end tells that this process is gone
            threading.Thread(target=self._watch, args=(rank, lost), name=f"process {rank}", daemon=True).start()

    def _watch(self, rank: int, lost: Callable[[Failed | None], None]) -> None:
        code = self._processes[rank].wait()
        self.ended[rank] = code
        # Over a network of sockets this process hears of it at once; a GPU's would wait for ever.
        if code and not self._over.wait(ENDS_WITHIN_S):
            lost(self.cause())

    def cause(self) -> Failed | None:
        """Why this process lost the others: what one of them wrote down, or how it ended. None where it did not."""
        until = time.monotonic() + (CAUSE_COMES_WITHIN_S if self.count > 1 else 0)
        while True:
            for rank in range(1, self.count):
                if failed := _told(self.run, rank):
                    return Failed(failed.kind, f"Process {rank + 1} of {self.count}: {failed.message}", failed.hint)
                if code := self.ended.get(rank, 0):
                    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
                    return Failed(
                        "process_lost",
                        f"Process {rank + 1} of {self.count} {how}.",
                        "If memory was full, lower Train batch size (train_batch_size) or Number of processes "
                        "(num_processes). Training goes on from its last state.",
                    )
            if time.monotonic() > until:
                return None
            time.sleep(0.1)

    def close(self, patience_s: float) -> None:
        """Wait for their end, or see to it."""
        self._over.set()
        until = time.monotonic() + patience_s
        for process in self._processes.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin
            with suppress(OSError):  # nobody reads it any more
                process.stdin.close()
        for rank in range(1, self.count):
            _report(self.run, rank).unlink(missing_ok=True)


@contextmanager
def followed(
    run: Run, count: int, gpus: str, settings: Mapping[str, Any], lost: Callable[[Failed | None], None]
) -> Iterator[Followers]:
    """Inside a with block this process is the first of `count`; the others are gone behind it.

    Those that a launcher has started already are not started again. `lost` is told the cause where one has died and
    this process does not end for that by itself.
    """
    followers = Followers(run, count)
    alone = here().count == 1
    set_here = {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    if alone and count > 1:
        set_here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "RANK": "0", "LOCAL_RANK": "0"}
        set_here |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    before = {name: os.environ.get(name) for name in set_here}
    os.environ.update(set_here)
    patience_s = 0.0
    try:
        if alone:
            followers.start(settings, lost)
        yield followers
        patience_s = ENDS_WITHIN_S
    finally:
        followers.close(patience_s)
        leave()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def write_down(run: Run, rank: int, failed: Failed) -> None:
    """Leave word for the first process of why this one ends."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(_report(run, rank), json.dumps(asdict(failed)).encode())


def _report(run: Run, rank: int) -> Path:
    return run.folder / f"process{rank}.failed"


def _told(run: Run, rank: int) -> Failed | None:
    try:
        return Failed(**json.loads(_report(run, rank).read_text()))
    except FileNotFoundError:
        return None


def _end_with_the_first() -> None:
    """End this process when standard input does, which the first process holds open as long as it lives."""
    while os.read(0, 1024):
        pass
    os._exit(EXIT_FAILED)


def main() -> int:
    from trainer import kohya
    from trainer.start import follow

    settings = json.loads(sys.stdin.buffer.readline() or b"null")
    if settings is None:  # it was gone before it could say anything
        return EXIT_FAILED
    threading.Thread(target=_end_with_the_first, name="lifeline", daemon=True).start()
    return follow(kohya.read(settings), Run(Path(sys.argv[1])), here())


if __name__ == "__main__":
    sys.exit(main())
