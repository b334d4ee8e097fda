// The tabs beside the form: all runs, and the form as JSON.

class RunList {
  constructor(server, live) {
    Object.assign(this, { server, live });
    setInterval(() => this.refresh(), 3000);
  }

  async refresh() {
    const body = byId("lw-runs");
    if (!body?.offsetParent || document.hidden || this.asking) return;
    this.asking = true;
    try {
      const { runs, more } = await this.server.runs({});
      const key = JSON.stringify([runs, this.live.run]);
      if (this.shown !== key || !body.childElementCount) {
        this.shown = key;
        const focused = document.activeElement?.dataset?.run;
        body.replaceChildren(...runs.map((run) => this.row(run)));
        if (focused) body.querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
        byId("lw-runs-note").textContent = !runs.length ? "No runs yet." : more ? `${more} older runs are not shown.` : "";
      }
    } catch {
      byId("lw-runs-note").textContent = "The server does not answer; trying again …";
    } finally {
      this.asking = false;
    }
  }

  row(run) {
    const watching = run.id === this.live.run;
    return make("tr", { "aria-current": watching ? "true" : null },
      make("td", {}, make("span", { class: "lw-pill", "data-state": run.state }, run.state)),
      make("td", {}, make("button", { class: "lw-link", type: "button", "data-run": run.id, onclick: () => { this.live.watch(run.id); this.shown = ""; setTimeout(() => this.refresh(), 400); } }, run.name)),
      make("td", {}, new Date(run.began * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })),
      make("td", { class: "lw-number" }, run.total ? `${run.step}/${run.total}` : "–"),
      make("td", { class: "lw-number" }, run.loss === null ? "–" : run.loss.toPrecision(3)),
      make("td", {}, watching ? "shown at the side" : ""));
  }
}

class Json {
  constructor(server, form, bar) {
    Object.assign(this, { server, form, bar });
    form.whenChanged.push(() => this.refresh());
    // The tab is built when it is first opened; who types at once is heard all the same.
    document.addEventListener("input", (event) => {
      if (event.target.id === "lw-json") { this.edited = true; byId("lw-json-apply").disabled = false; }
    });
    document.addEventListener("click", (event) => {
      if (event.target.id === "lw-json-apply") this.bar.order(() => this.apply());
      if (event.target.id === "lw-json-copy") navigator.clipboard?.writeText(byId("lw-json").value);
    });
    setInterval(() => { if (!this.filled) this.refresh(); }, 200);
  }

  async refresh() {
    const box = byId("lw-json");
    const free = () => box?.offsetParent && !this.edited && document.activeElement !== box;
    this.filled = Boolean(free());
    if (!this.filled) return;
    try {
      const { text } = await this.server.flat({ entries: this.form.entries, kept: this.form.kept });
      if (free()) box.value = text; else this.filled = false;
    } catch { /* the live panel says that the server is away; the next change asks again */ }
  }

  async apply() {
    const answer = await this.server.parse({ text: byId("lw-json").value });
    if (!answer.entries) {
      this.bar.banner.show("error", "This is not a preset.", answer.problems);
      if (answer.line) select_line(byId("lw-json"), answer.line);
      return;
    }
    this.edited = false;
    byId("lw-json-apply").disabled = true;
    await this.bar.take(answer, "The form shows what the JSON says.");
    this.refresh();
  }
}

function select_line(box, line) {
  const lines = box.value.split("\n");
  const start = lines.slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
  box.focus();
  box.setSelectionRange(start, start + lines[line - 1].length);
}
