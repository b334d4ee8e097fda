// The bar: presets, what differs, check and start.

const FIRST = "shipped/first-steps"; // what the form shows on the first visit

class Bar {
  constructor(form, banner, server, live) {
    Object.assign(this, { form, banner, server, live });
    this.preset = byId("lw-preset");
    this.on("lw-load", () => this.load());
    this.on("lw-diff", () => this.diff());
    this.on("lw-save", () => this.save());
    this.on("lw-delete", () => this.remove());
    this.on("lw-reset", () => this.reset());
    this.on("lw-changed", () => this.tellChanged());
    this.on("lw-check", () => this.check());
    this.on("lw-start", () => this.start());
    this.on("lw-try", () => this.trial());
    this.on("lw-queue", () => this.enqueue());
    live.whenBusy = (busy) => { this.offerTrial(busy); if (this.sawBusy && !busy) banner.over("busy"); this.sawBusy = busy; };
    live.whenBack = () => banner.over("back");
    this.offerTrial(false);
    form.resetting = (p) => this.order(() => this.resetOne(p));
    form.whenChanged.push(() => this.count());
    form.whenChanged.push(() => this.draftLater());
    form.whenChanged.push(() => banner.outdate(form.entries));
    addEventListener("pagehide", () => { this.draftAtOnce(); this.askAtOnce("left", { page: PAGE }); });
    document.addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && event.key === "Enter") { event.preventDefault(); byId("lw-start").click(); }
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s") { event.preventDefault(); byId("lw-save").click(); }
    });
  }

  on(id, act) {
    byId(id).addEventListener("click", () => this.order(act));
  }

  // While one order is under way, no other is taken, and that is told; a failure is, too.
  async order(act) {
    if (this.working) return this.banner.show("info", t`One thing at a time: what was asked for before is still under way. Press again when it is done.`);
    this.working = true;
    document.body.classList.add("lw-working");
    const before = this.banner.node.firstChild;
    try {
      await act();
      if (this.banner.node.firstChild === before) this.banner.over("back", "done");
    } catch (error) {
      this.banner.show("error", t`${error.message} A training that runs is not affected.`);
      if (error.status === 0) this.banner.until = "back";
    } finally {
      this.working = false;
      document.body.classList.remove("lw-working");
    }
  }

  // The preset that the form was filled with; "" if with something else, null on the first visit.
  get source() { return localStorage.getItem("lorawright.preset"); }

  // `misnamed`: files among the user's own whose names cannot be a preset's.
  offer({ presets, misnamed }) {
    const chosen = this.source ?? FIRST;
    const group = (label, shelf) => {
      const ids = presets.filter((id) => id.startsWith(shelf));
      return ids.length ? [make("optgroup", { label }, ...ids.map((id) => make("option", { value: id }, id.slice(shelf.length))))] : [];
    };
    this.preset.replaceChildren(make("option", { value: "", hidden: true }, t`choose a preset`), ...group(t`Your presets`, "own/"), ...group(t`Built in`, "shipped/"),
      ...(misnamed.length ? [make("optgroup", { label: t`Rename these files to list them: letters, digits, blanks, . - _ + ( )` }, ...misnamed.map((name) => make("option", { disabled: true }, name)))] : []));
    this.choose(presets.includes(chosen) ? chosen : "");
    this.preset.onchange = () => this.choose(this.preset.value, false);
  }

  // Show a preset in the select; `kept`: it is what the form was filled with, also after a reload.
  choose(id, kept = true) {
    this.preset.value = id;
    byId("lw-load").disabled = byId("lw-diff").disabled = !id;
    byId("lw-delete").hidden = !id?.startsWith("own/");
    byId("lw-load").classList.toggle("lw-primary", !kept && id !== this.source); // chosen is not loaded yet
    if (kept) localStorage.setItem("lorawright.preset", id);
  }

  count() {
    const n = this.form.changed().length;
    byId("lw-changed").textContent = n ? t`${n} changed` : t`all default`;
    byId("lw-changed").disabled = !n;
  }

  draftLater() {
    clearTimeout(this.drafting);
    this.undrafted = true;
    this.drafting = setTimeout(async () => {
      const entries = this.form.entries;
      let answer;
      try {
        answer = await this.server.draft({ entries, kept: this.form.kept });
      } catch {
        this.drafting = setTimeout(() => this.draftLater(), 3000);
        return;
      }
      if (entries === this.form.entries) { this.form.mark(answer.problems); this.undrafted = false; }
    }, 500);
  }

  // A page that is closed is not waited for, so its last change is sent in a request that outlives it.
  draftAtOnce() {
    if (this.undrafted) this.askAtOnce("draft", { entries: this.form.entries, kept: this.form.kept });
  }

  askAtOnce(fn_name, data) {
    const component_id = gradio_config.components.find((c) => c.props.elem_id === "bar").id;
    fetch("gradio_api/component_server/", { method: "POST", keepalive: true, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ data, component_id, fn_name, session_hash: "closing" }) });
  }

  async load() {
    const id = this.preset.value, name = id.split("/")[1];
    const answer = await this.presetFor(id);
    const stays = this.form.table.filter((p) => answer.stays?.includes(p.key)).map((p) => p.label).join(", ");
    await this.take(answer, stays ? t`Loaded “${name}”. Kept as you entered it: ${stays}.` : t`Loaded “${name}”.`, id);
  }

  // A preset as the server reads it for this form, whose own model, folders and names stay where it has none.
  async presetFor(id) {
    return this.server.load({ id, entries: await this.form.read(), source: this.source ?? FIRST });
  }

  // Show a preset that the server read, and what became of its keys. Undo brings the form back.
  // `id`: the preset that the form then shows, "" when it is none.
  async take(answer, title, id = "") {
    if (!answer.entries) return this.banner.show("error", t`This preset cannot be loaded.`, answer.problems);
    const before = { entries: await this.form.read(), kept: this.form.kept, id: this.source };
    await this.form.fill(answer.entries, answer.kept);
    this.choose(id);
    const undo = [t`Undo`, async () => { await this.form.fill(before.entries, before.kept); this.choose(before.id); this.banner.clear(); }];
    const items = [...answer.problems, ...answer.notes];
    const worst = answer.problems.some((p) => p.severity === "error") ? "error" : items.length ? "warning" : "info";
    this.banner.show(worst, title, items, [undo], answer.description);
  }

  async save() {
    const input = make("input", { class: "lw-input", value: this.preset.value.split("/")[1] || this.form.entries.output_name || "", maxLength: 80, required: true, "aria-label": t`Name of the preset` });
    const about = make("input", { class: "lw-input", value: (this.source?.startsWith("own/") && this.form.kept.description) || "", maxLength: 300, "aria-label": t`Description of the preset` });
    const content = make("div", { class: "lw-stack" }, make("label", { class: "lw-stack" }, t`Name`, input),
      make("label", { class: "lw-stack" }, t`Description, told when it is loaded`, about));
    setTimeout(() => input.select());
    if ((await ask(t`Save preset`, content, [["", t`Cancel`], ["save", t`Save`, "lw-primary"]])) !== "save") return;
    const { description, ...kept } = this.form.kept;
    if (about.value.trim()) kept.description = about.value.trim();
    const order = { name: input.value, entries: await this.form.read(), kept };
    let answer = await this.server.save(order);
    if (answer.exists) {
      const text = make("p", {}, t`“${order.name}” exists among your presets.`);
      if ((await ask(t`Replace it?`, text, [["", t`Cancel`], ["yes", t`Replace`, "lw-primary"]])) !== "yes") return;
      answer = await this.server.save({ ...order, replace: true });
    }
    if (answer.problems) return this.banner.show("error", t`The preset was not saved.`, answer.problems);
    this.form.kept = kept;
    this.offer(answer);
    this.choose(answer.id);
    this.banner.show("good", t`Saved as ${answer.path}`);
  }

  async remove() {
    const id = this.preset.value, name = id.split("/")[1];
    const text = make("p", {}, t`The preset “${name}” is deleted for good. The form stays as it is.`);
    if ((await ask(t`Delete the preset?`, text, [["", t`Keep`], ["delete", t`Delete`, "lw-danger"]])) !== "delete") return;
    const answer = await this.server.preset_delete({ id });
    if (answer.problems) return this.banner.show("error", t`The preset was not deleted.`, answer.problems);
    this.offer(answer);
    this.banner.show("good", t`Deleted “${name}”.`);
  }

  async reset() {
    await this.take({ entries: Object.fromEntries(this.form.table.map((p) => [p.key, p.default])), kept: {}, problems: [], notes: [] },
      t`All parameters are back at their defaults.`);
  }

  async resetOne(p) {
    const entries = await this.form.read();
    await this.take({ entries: { ...entries, [p.key]: p.default }, kept: this.form.kept, problems: [], notes: [] },
      t`${p.label} is back at its default. It was ${this.form.spoken(entries[p.key])}.`, this.source);
  }

  tellChanged() {
    const items = this.form.changed().map((p) => ({ severity: "changed", key: p.key,
      message: t`${this.form.spoken(this.form.entries[p.key])} (default: ${this.form.spoken(p.default)})`,
      act: [t`reset`, () => this.order(() => this.resetOne(p)), t`Reset ${p.label}`] }));
    this.banner.show("info", items.length ? t`Different from the defaults:` : t`Everything is at its default.`, items,
      [[t`Since the last run`, () => this.order(() => this.sinceLastRun())]]);
  }

  // What another set of settings has otherwise: [items for the banner].
  steps(before, after) {
    return this.form.differing(before, after).map((p) => ({ severity: "changed", key: p.key,
      message: `${this.form.spoken(before[p.key] ?? p.default)} → ${this.form.spoken(after[p.key] ?? p.default)}` }));
  }

  // What loading the chosen preset would change, before it is loaded.
  async diff() {
    const id = this.preset.value, name = id.split("/")[1];
    const answer = await this.presetFor(id);
    if (!answer.entries) return this.banner.show("error", t`This preset cannot be loaded.`, answer.problems);
    const items = this.steps(await this.form.read(), answer.entries);
    this.banner.show("info", items.length ? t`“${name}” would change ${counted(items.length, "parameter")}:` : t`“${name}” is what the form shows.`,
      items, items.length ? [[t`Load it`, () => this.order(() => this.load())]] : [], answer.description);
  }

  async sinceLastRun() {
    const answer = await this.server.settings({ run: "" });
    if (!answer.run) return this.banner.show("info", t`There is no run yet.`);
    if (!answer.entries) return this.banner.show("error", t`The settings of ${answer.run} cannot be read.`, answer.problems);
    const items = this.steps(answer.entries, await this.form.read());
    this.banner.show("info", items.length ? t`Changed since ${answer.run}:` : t`Nothing has changed since ${answer.run}.`, items,
      items.length ? [[t`Back to its settings`, () => this.order(() => this.take(answer, t`The settings of ${answer.run}.`))]] : []);
  }

  async check() {
    this.banner.busy(t`Checking the settings, the model and the images …`);
    const answer = await this.server.check({ entries: await this.form.read(), kept: this.form.kept });
    const ready = !answer.problems.some((p) => p.severity === "error");
    this.tell(answer, t`Ready to start. ${answer.outline}`, ready ? [[t`Measure memory and time`, () => this.order(() => this.trial())]] : []);
  }

  // Beside a run it would be measured with it, which the server refuses; who presses all the same is told so.
  offerTrial(busy) {
    byId("lw-try").setAttribute("aria-disabled", String(busy));
    byId("lw-try").title = busy ? t`Not while a run is going on, which would be measured too.`
      : t`Three steps and a picture for real: whether the memory suffices, and how long all will take.`;
  }

  // Three steps and a picture for real: whether the memory suffices, and how long all will take.
  async trial() {
    this.banner.show("busy", t`Trying three steps and a picture for real; a large model takes minutes …`, [], [[t`Stop`, () => this.server.trial_stop({})]]);
    const { problems, notes, trial } = await this.server.trial(await this.shown());
    if (!trial && !problems.length) return this.banner.show("info", t`The trial was stopped; nothing was measured.`);
    if (!trial) return this.tell({ problems, notes: notes || [] }, "");
    const savings = trial.tight ? trial.savings.map((p) => ({ ...p, severity: "less memory" })) : [];
    this.banner.show(trial.ended_in ? "error" : trial.tight ? "warning" : "good", trial.lines[0], savings);
  }

  async shown() { return { entries: await this.form.read(), kept: this.form.kept }; }

  // Start on the form, or on other settings; `instead`: what is offered when that is refused. True when it runs.
  async start(settings = null, instead = []) {
    this.banner.busy(t`Checking, then starting …`);
    const answer = await this.server.start(settings || await this.shown());
    if (!answer.run) {
      const queue = [t`Add to the queue`, () => this.order(() => this.enqueue(settings))];
      this.tell(answer, "", [...(answer.busy ? [queue] : []), ...instead], settings);
      if (answer.busy) this.banner.until = "busy";
      return false;
    }
    const worth = answer.problems.length || answer.notes.length;
    if (worth) this.tell(answer, t`Started. ${answer.outline}`);
    else this.banner.clear();
    this.live.watch("");
    return true;
  }

  async enqueue(settings = null) {
    this.banner.busy(t`Checking, then adding to the queue …`);
    const answer = await this.server.enqueue(settings || await this.shown());
    this.tell(answer, answer.at_once ? t`In the queue: nothing else runs, so it starts now.` : t`In the queue: it starts when what runs has ended.`, answer.run ? [[t`Show the queue`, () => this.form.open("Runs")]] : [], settings);
  }

  // `elsewhere`: the settings, where they are not those that the form shows.
  tell(answer, success, actions = [], elsewhere = null) {
    const errors = answer.problems.filter((p) => p.severity === "error");
    if (!elsewhere) this.form.mark([...errors]);
    const items = [...errors, ...answer.problems.filter((p) => p.severity !== "error"), ...answer.notes];
    const titled = (n) => (n === 1 ? t`One thing stands in the way of training:` : t`${n} things stand in the way of training:`);
    const title = errors.length ? titled(errors.length) : success;
    this.banner.show(errors.length ? "error" : items.length ? "warning" : "good", title, items, actions);
    if (!errors.length) return;
    if (elsewhere) this.banner.until = "done";
    else this.banner.blames(this.form.entries, titled);
  }
}
