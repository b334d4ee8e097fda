// The tabs beside the form: all runs, and the form as JSON.

class RunList {
  constructor(server, live, bar) {
    Object.assign(this, { server, live, bar, chosen: new Set() });
    this.comparison = new Compare(bar.form, server, live);
    this.runs = [];
    new Sweep(bar.form, server, bar, this);
    this.chooser = new Chooser(server, live, bar);
    live.resuming = (id) => bar.order(() => this.resume({ id }));
    document.addEventListener("click", (event) => {
      if (event.target.role === "tab") this.seen = false; // a tab that is opened shows what is true now
      if (event.target.id === "lw-compare-now") this.bar.order(() => this.comparison.show([...this.chosen]));
    });
    setInterval(() => { if (!this.seen) this.refresh(); }, 200);
  }

  async refresh() {
    const body = byId("lw-runs"), seen = byId("lw-runs-tab")?.offsetParent;
    if (!seen) this.seen = false; // asked again the moment the tab is opened
    if (!seen || document.hidden || this.asking) return;
    this.seen = this.asking = true;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { this.seen = false; }, 3000);
    try {
      const { runs, more, queue, trouble } = await this.server.runs({});
      const key = JSON.stringify([runs, this.live.run, queue, trouble]);
      if (this.shown !== key || body.dataset.filled !== "1") {
        this.shown = key;
        body.dataset.filled = "1";
        const focused = document.activeElement?.dataset?.act;
        const place = (run) => (run.state === "queued" ? queue.indexOf(run.id) : Infinity);
        runs.sort((a, b) => (place(a) === place(b) ? 0 : place(a) - place(b)));
        for (const id of this.chosen) if (!runs.some((run) => run.id === id)) this.chosen.delete(id);
        this.runs = runs;
        body.replaceChildren(...runs.map((run) => this.row(run, place(run))));
        byId("lw-runs-list").hidden = !runs.length;
        this.count();
        if (focused) body.querySelector(`[data-act="${CSS.escape(focused)}"]`)?.focus();
        byId("lw-runs-note").textContent = [!runs.length && t`No runs yet. Each training that you start is listed here with its state and loss; from here it is resumed, repeated, compared with others, or deleted.`,
          trouble && t`The queue stands still: ${trouble}.`,
          queue.length && t`When a run ends, however it ends, the next in the queue begins.`,
          more && t`${more} older runs are not shown.`].filter(Boolean).join(" ");
      }
    } catch {
      byId("lw-runs-note").textContent = t`The server does not answer; trying again …`;
    } finally {
      this.asking = false;
    }
  }

  again() { this.shown = ""; return this.refresh(); }

  count() { byId("lw-compare-now").disabled = this.chosen.size < 2 || this.chosen.size > MOST_COMPARED; }

  row(run, place) {
    const waits = run.state === "queued", alive = ["starting", "running", "stopping"].includes(run.state);
    const choose = make("input", { type: "checkbox", checked: this.chosen.has(run.id), "aria-label": t`Compare ${run.id}`, "data-act": `compare ${run.id}`,
      onchange: (event) => { this.chosen[event.target.checked ? "add" : "delete"](run.id); this.count(); } });
    const act = (word, does) => make("button", { class: "lw-link lw-small", type: "button", "aria-label": `${word} ${run.id}`, "data-act": `${word} ${run.id}`,
      onclick: () => this.bar.order(does) }, word);
    const turn = (word) => async () => { await this.server.turn({ run: run.id, word }); await this.again(); };
    const went_on = this.runs.filter((other) => other.origin === run.id);
    return make("tr", { "aria-current": run.id === this.live.run ? "true" : null },
      make("td", {}, waits ? "" : choose),
      make("td", {}, make("span", { class: "lw-pill", "data-state": run.state }, waits ? t`queued ${place + 1}` : said(run.state))),
      make("td", {}, waits ? run.name : this.shower(run.id, run.name),
        make("div", { class: "lw-facts" }, waits ? t`Added ${moment(run.began)}` : moment(run.began), " · ", make("span", {}, run.id)),
        run.origin && this.kin(t`Went on from `, run.origin),
        ...went_on.map((other) => this.kin(t`Went on as `, other.id)),
        !went_on.length && this.stranded(run)),
      make("td", { class: "lw-number" }, run.total ? `${run.step}/${run.total}` : "–"),
      make("td", { class: "lw-number" }, run.loss === null ? "–" : run.loss.toPrecision(3)),
      make("td", { class: "lw-acts" }, run.sweep && act(said("Sweep"), () => this.sweep(run)), run.files > 0 && act(said("Choose a checkpoint"), () => this.chooser.open(run.id)), run.stranded === "" && act(said("Resume"), () => this.resume(run)), act(said("Repeat"), () => this.repeat(run)),
        waits ? place > 0 && act(said("Earlier"), turn("earlier")) : act(said("Files"), () => this.files(run)),
        waits ? act(said("Remove"), turn("remove")) : !alive && act(said("Delete"), () => this.remove(run))));
  }

  // A button that shows a run in the panel at the side.
  shower(id, words, more = {}) {
    return make("button", { class: "lw-link", type: "button", title: t`Show ${id} at the side`, "data-act": id, ...more,
      onclick: () => { this.live.watch(id); setTimeout(() => this.again(), 400); } }, words);
  }

  kin(words, id) { return make("div", { class: "lw-facts" }, words, this.shower(id, id, { class: "lw-link lw-small", "data-act": null })); }

  // The table of all runs of the same sweep, as far as they are, in the order in which they start.
  async sweep({ sweep }) {
    const same = this.runs.filter((run) => run.sweep === sweep).map((run) => run.id).sort();
    await this.comparison.show(same);
  }

  // Why an ended run cannot go on, and what to switch on so that the next one can.
  stranded(run) {
    if (run.stranded && !run.step) return make("div", { class: "lw-facts" }, t`Nothing had been trained yet. Repeat starts it anew.`);
    if (run.stranded === "gone") return make("div", { class: "lw-facts" }, t`Cannot be resumed: its saved state is gone.`);
    return run.stranded === "none" && make("div", { class: "lw-facts" }, t`Cannot be resumed: it saved no state. For the next run, switch on `,
      make("button", { class: "lw-link lw-small", type: "button", onclick: () => this.bar.form.focus("save_state") }, this.bar.form.label("save_state")), ".");
  }

  async repeat(run) {
    const answer = await this.server.settings({ run: run.id });
    if (!answer.entries) return this.bar.banner.show("error", t`The settings of ${run.id} cannot be read.`, answer.problems);
    await this.bar.take(answer, t`The form now holds the settings of ${run.id}. Change what you like, then press Start training.`);
  }

  // Start at once. Where that is refused the form stays as it was.
  async resume(run) {
    const answer = await this.server.resume({ run: run.id });
    if (!answer.entries) return this.bar.banner.show("error", t`${run.id} cannot go on.`, answer.problems);
    const into_form = () => this.bar.take(answer, t`The form now holds the settings of ${run.id}, to go on from its newest state. Press Start training when they are right.`);
    const started = await this.bar.start({ entries: answer.entries, kept: answer.kept },
      [[t`Show its settings in the form`, () => this.bar.order(into_form)]]);
    if (started) await this.bar.take({ ...answer, entries: answer.form }, t`${run.id} goes on from its newest state. The form now holds its settings.`);
  }

  async files(run) {
    const { files } = await this.server.files({ run: run.id });
    const list = files.map(([name, size]) => make("li", {}, make("button", { type: "button", onclick: () => this.live.download(name, run.id) },
      `↓ ${name}`, make("span", { class: "lw-facts" }, bytes(size)))));
    await ask(t`Files of ${run.id}`, make("ul", { class: "lw-files lw-few" }, ...list), [["", t`Close`]]);
  }

  // Ask with the names of all that would go and of what would stay.
  async remove(run) {
    const found = await this.server.delete({ run: run.id });
    const told = (word, names) => names.length > 0 && make("p", {}, make("b", {}, word), names.join(", "));
    const text = make("div", { class: "lw-stack lw-names" }, told(t`Deleted for good: `, found.goes || []),
      told(t`Left alone, since the trainer did not write it: `, found.stays || []),
      told(t`Left alone in its own folder: `, found.elsewhere || []));
    const sure = found.goes && await ask(t`Delete ${run.id}?`, text, [["", t`Keep`], ["delete", t`Delete`, "lw-danger"]]);
    if (sure === "") return;
    const { refused } = sure ? await this.server.delete({ run: run.id, sure: true }) : found;
    if (refused) this.bar.banner.show("error", t`The run is not deleted.`, [{ severity: "error", message: refused }]);
    else { this.leave(run.id); this.bar.banner.show("good", t`Deleted ${run.id}.`); }
    await this.again();
  }

  // What is open of a run that is gone.
  leave(id) {
    if (this.chooser.run === id) this.chooser.close();
    if (this.comparison.runs.some(({ run }) => run === id)) this.comparison.close();
  }
}

const moment = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

class Json {
  constructor(server, form, bar) {
    Object.assign(this, { server, form, bar });
    form.whenChanged.push(() => this.refresh());
    // The tab is built when it is first opened; who types at once is heard all the same.
    document.addEventListener("input", (event) => {
      if (event.target.id === "lw-json") this.mark(true);
    });
    document.addEventListener("change", (event) => {
      if (event.target.id === "lw-json-file") this.bar.order(() => this.open(event.target));
    });
    document.addEventListener("click", (event) => {
      if (event.target.id === "lw-json-apply") this.bar.order(() => this.apply());
      if (event.target.id === "lw-json-discard") { this.mark(false); this.refresh(); }
      if (event.target.id === "lw-json-copy") this.copy();
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

  // What was typed stays, and the form waits, until it is applied or discarded.
  mark(edited) {
    this.edited = edited;
    byId("lw-json-apply").disabled = byId("lw-json-discard").hidden = !edited;
    this.tell("");
  }

  tell(words) { byId("lw-json-told").textContent = [this.edited && t`edited, not applied`, words].filter(Boolean).join(" · "); }

  // Only a page that is secure (https, or on this machine) has a clipboard.
  async copy() {
    const box = byId("lw-json");
    let copied = await navigator.clipboard?.writeText(box.value).then(() => true, () => false);
    if (!copied) {
      box.focus();
      box.select();
      copied = document.execCommand("copy");
      if (copied) byId("lw-json-copy").focus(); // what is being typed in does not follow the form
    }
    this.tell(copied ? t`Copied.` : t`Press Ctrl+C to copy what is selected.`);
  }

  // A preset's file from where the browser runs.
  async open(input) {
    const [file] = input.files;
    input.value = ""; // so that the same file can be opened again
    if (!file) return;
    await this.take(await file.text(), t`The form shows what ${file.name} says.`);
  }

  async apply() { await this.take(byId("lw-json").value, t`The form shows what the JSON says; what it leaves out is at its default.`); }

  // Show a preset's text in the form; where it is none, in the box, with the cursor where it is wrong.
  async take(text, title) {
    const answer = await this.server.parse({ text });
    if (!answer.entries) {
      byId("lw-json").value = text;
      this.mark(true);
      this.bar.banner.show("error", t`This cannot be read as a preset.`, answer.problems);
      if (answer.line) select_line(byId("lw-json"), answer.line);
      return;
    }
    this.mark(false);
    await this.bar.take(answer, title);
    this.refresh();
  }
}

function select_line(box, line) {
  const lines = box.value.split("\n");
  const start = lines.slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
  box.focus();
  box.setSelectionRange(start, start + lines[line - 1].length);
}
