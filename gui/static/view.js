// The page of those who only look on: the live panel without its controls.

class View extends Live {
  controls() {}
  buttons() {}
  files() {}
  warn() {}
  headline() {}

  idle() {
    super.idle();
    this.say(t`Nothing has been trained here yet.`);
  }

  result(end) {
    return end?.seconds ? t`Took ${duration(end.seconds)}.` : "";
  }

  crash(cause) {
    byId("lw-crash").hidden = !cause;
    byId("lw-crash").textContent = cause?.title || "";
  }
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.documentElement.classList.toggle("dark", dark.matches);
dark.addEventListener("change", paint);
paint();

// All addresses are relative to the link, so that it works behind a proxy and a tunnel, too.
const watched = {
  async poll({ run, events }) {
    let answer;
    try {
      answer = await fetch(`poll?${new URLSearchParams({ run, events })}`, { cache: "no-store" });
    } catch {
      throw new Error(t`The server does not answer.`);
    }
    if (!answer.ok) throw Object.assign(new Error(answer.status === 404 ? t`This link has ended: the page was started anew.` : t`The server failed at this.`), { status: answer.status });
    return { samples: [], saved: [], verified: [], warnings: [], ...await answer.json() };
  },
};
new View(watched, null);
document.documentElement.dataset.lorawright = "ready";
