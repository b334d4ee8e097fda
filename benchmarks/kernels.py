"""How many kernels one step asks the device for, here and in kohya's sd-scripts.

    python benchmarks/kernels.py [--sd-scripts FOLDER --python ENVIRONMENT/bin/python --tokenizers FOLDER] [--work FOLDER]

At batch size 1 a GPU computes faster than Python can ask, so that a step is as long as its list of kernels. The list
is nearly the same on a processor: counted are PyTorch's operators but for those that view or read a tensor or make an empty one,
forward and backward, between the ends of the third and the fourth optimizer step. What PyTorch does for all tensors at
once on a GPU alone (foreach, in its optimizers and in clipping) it does so here in both programs. SD 1.5 of full size with random weights, rank 8 on U-Net and text
encoder, bf16; nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path

from full_size import ROOT, make_images, make_model, our_settings, run_alone, their_settings

COUNTED = "LORAWRIGHT_COUNTED"
AFTER = 3
NO_KERNELS = ("_unsafe_view", "_local_scalar_dense", "_record_function_enter_new", "_record_function_exit")
MOST = 12
"""Operators that are shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("benchmark-work"))
    parser.add_argument("--sd-scripts", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--tokenizers", type=Path, help="sd-scripts' --tokenizer_cache_dir")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model, images = make_model(work / "sd15-random.safetensors"), make_images(work / "images")
    preset = work / "preset.json"
    settings = our_settings(model, images, 128, "bf16") | {
        "max_train_steps": AFTER + 1,
        "output_dir": str(work / "out"),
    }
    preset.write_text(json.dumps(settings))
    found = {"lorawright": count([sys.executable], ["-m", "trainer", "train", str(preset)], ROOT, work)}
    if chosen.sd_scripts:
        words = their_settings(model, images, work / "sd-scripts", 128, "bf16", AFTER + 1, chosen.tokenizers)
        words = ["train_network.py", *words, "--network_dim=8", "--optimizer_type=AdamW"]
        found["sd-scripts"] = count([str(chosen.python), "-u"], words, chosen.sd_scripts, work)
    print(f"{'':32}" + "".join(f"{name:>12}" for name in found))
    print(f"{'all kernels':32}" + "".join(f"{kernels.total():12}" for kernels in found.values()))
    every = sum(found.values(), Counter())
    for operator, _ in every.most_common(MOST):
        print(f"{operator:32}" + "".join(f"{kernels[operator]:12}" for kernels in found.values()))


def count(python: list[str], words: list[str], folder: Path, work: Path) -> Counter[str]:
    """The kernels of one step of a program, by operator."""
    answer = work / "kernels.json"
    answer.unlink(missing_ok=True)
    os.environ |= {COUNTED: str(answer), "PYTHONPATH": str(folder)}
    run_alone([*python, str(Path(__file__).resolve()), *words], folder, work / "kernels.log")
    del os.environ[COUNTED]
    return Counter(json.loads(answer.read_text()))


def counted(answer: Path) -> None:
    """Run the program that the command line names, and count the kernels of its fourth step."""
    from torch.optim import optimizer
    from torch.utils import _foreach_utils
    from torch.utils._python_dispatch import TorchDispatchMode

    kernels: Counter[str] = Counter()
    steps = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            name = operator.overloadpacket.__name__
            kernels[name] += not (operator.is_view or name in NO_KERNELS or name.startswith("empty"))
            return operator(*arguments, **(options or {}))

    count = Count()

    def ended(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == AFTER:
            count.__enter__()
        elif steps == AFTER + 1:
            count.__exit__(None, None, None)
            answer.write_text(json.dumps(kernels))

    for module in (optimizer, _foreach_utils):
        module._get_foreach_kernels_supported_devices = lambda: ["cpu", "cuda"]
    optimizer.register_optimizer_step_post_hook(ended)
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        sys.path[0] = str(ROOT)
        from trainer import attention

        attention.multiplies_bf16 = lambda: False  # as on a GPU
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path.cwd())
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if COUNTED in os.environ:
        counted(Path(os.environ[COUNTED]))
    else:
        main()
