// The Tools tab: forms by the tools' declarations, one running tool, its progress and its report.

const OUTPUTS = { merge: "merged", "merge-loras": "merged", resize: "resized", extract: "difference", convert: "converted", grid: "grid" };

// A comma is where many countries have the point.
const strength = (text) => Number(text.trim().replace(",", ".") || 1);

class Tools {
  constructor(server, form, bar) {
    Object.assign(this, { server, form, bar, entries: {}, pairs: {}, offset: 0, typed: {} });
    setInterval(() => { if (byId("lw-tools")?.offsetParent) this.seen(); }, 200);
    // Runs and tools write files meanwhile; where the server is away, those of before are good enough.
    document.addEventListener("focusin", (event) => { if (event.target.list?.id === "lw-loras") this.suggest().catch(() => {}); });
  }

  // The tab is built when it is first opened.
  async seen() {
    const box = byId("lw-tools");
    if (box.dataset.ready) return;
    box.dataset.ready = "1";
    try {
      const offer = await this.suggest();
      this.tools = new Map(offer.tools.map((tool) => [tool.name, { ...translated(tool), fields: tool.fields.map(translated) }]));
      for (const tool of offer.tools) this.entries[tool.name] = Object.fromEntries(tool.fields.map((p) => [p.key, p.default]));
    } catch (error) {
      delete box.dataset.ready;
      byId("lw-tool-summary").textContent = error.message;
      return;
    }
    this.list();
    byId("lw-tool-form").addEventListener("submit", (event) => { event.preventDefault(); this.bar.order(() => this.run()); });
    byId("lw-tool-stop").addEventListener("click", () => this.bar.order(() => this.server.tool_stop({})));
    this.choose(localStorage.getItem("lorawright.tool") || "inspect");
    await this.poll(true);
  }

  // The LoRA files to choose from.
  async suggest() {
    const offer = await this.server.tools({});
    byId("lw-loras").replaceChildren(...offer.loras.map((value) => make("option", { value })));
    return offer;
  }

  // By what they work on: as a list, and on a phone as a select.
  list() {
    const all = [...this.tools.values()];
    const groups = [...new Set(all.map((tool) => tool.group))].map((group) => [group, all.filter((tool) => tool.group === group)]);
    byId("lw-tool-names").replaceChildren(...groups.flatMap(([group, tools]) => [
      make("span", { class: "lw-tool-group", role: "presentation" }, group),
      ...tools.map((tool) => make("button", { type: "button", role: "tab", id: `lw-tool-${tool.name}`, "aria-controls": "lw-tool",
        onclick: () => this.choose(tool.name) }, tool.label))]));
    byId("lw-tool-names").addEventListener("keydown", (event) => this.turn(event));
    byId("lw-tool-pick").replaceChildren(...groups.map(([label, tools]) =>
      make("optgroup", { label }, ...tools.map((tool) => make("option", { value: tool.name }, tool.label)))));
    byId("lw-tool-pick").addEventListener("change", (event) => this.choose(event.target.value));
    this.order = groups.flatMap(([, tools]) => tools.map((tool) => tool.name));
  }

  // Show a tool, also before the tab was ever opened.
  async open(name) {
    localStorage.setItem("lorawright.tool", name);
    await this.form.open("Tools");
    if (this.tools) this.choose(name);
  }

  turn(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const names = this.order;
    const next = names[(names.indexOf(this.tool.name) + step + names.length) % names.length];
    this.choose(next);
    byId(`lw-tool-${next}`).focus();
  }

  choose(name) {
    this.tool = this.tools.get(name) || this.tools.get("inspect");
    localStorage.setItem("lorawright.tool", this.tool.name);
    byId("lw-tool-pick").value = this.tool.name;
    for (const tab of byId("lw-tool-names").querySelectorAll("[role=tab]")) {
      const chosen = tab.id === `lw-tool-${this.tool.name}`;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
    }
    byId("lw-tool").setAttribute("aria-labelledby", `lw-tool-${this.tool.name}`);
    byId("lw-tool-summary").textContent = this.tool.summary;
    if (this.tool.name === "caption") this.ofTheForm();
    this.draw();
    this.tell();
    if (this.tool.name === "caption") this.findOut();
  }

  get values() { return this.entries[this.tool.name]; }

  // LoRAs with their strengths as they were typed, one row each.
  get rows() { return this.pairs[this.tool.name] ??= [["", "1"]]; }

  draw() {
    const fields = this.tool.fields.filter((p) => p.key !== "strengths");
    byId("lw-tool-form").replaceChildren(...fields.map((p) => (p.key === "loras" ? this.loras(p) : this.field(p))));
    this.fit();
  }

  // Show the fields that apply, and name the output after the input until a name is typed.
  fit() {
    for (const p of this.tool.fields) {
      const node = byId(`lw-option-${p.key}`);
      if (node) node.hidden = !Object.entries(p.when).every(([other, values]) => values.includes(this.values[other]));
    }
    const input = byId("lw-output-output"), word = OUTPUTS[this.tool.name];
    if (!input || this.typed[this.tool.name]) return;
    const source = (this.values.loras || this.values.lora || this.values.tuned || "").split("\n")[0];
    const dot = source.lastIndexOf(".");
    const folder = this.tool.name === "merge" && !/\.[a-z]+$/i.test(this.values.model) && this.values.model;
    // What comes along lies where nobody may write.
    this.values.output = input.value = dot > 0 && !source.startsWith("embedded:") ? `${source.slice(0, dot)}-${word}${folder || word === "grid" ? "" : ".safetensors"}` : "";
  }

  set(key, value) {
    this.values[key] = value;
    if (key === "output") this.typed[this.tool.name] = value.trim() !== "";
    this.fit();
    if (key === "model" && this.tool.name === "caption") this.findOut();
  }

  // The images to caption are most often those that will be trained on.
  ofTheForm() {
    const { train_data_dir: folder, caption_extension: ending } = this.form.entries;
    if (this.values.folder || !folder || folder.startsWith("embedded:")) return;
    this.values.folder = folder;
    if (this.tool.fields.find((p) => p.key === "extension").choices.includes(ending)) this.values.extension = ending;
  }

  // What can be set follows from the kind of captioning model that the folder holds.
  async findOut() {
    const { values } = this, path = values.model;
    const { kind, told } = path.trim() ? await this.server.captioner({ path }).catch((error) => ({ kind: "", told: error.message })) : { kind: "", told: "" };
    if (path !== values.model || values !== this.values) return; // typed on, or another tool was chosen
    values.model_kind = kind;
    byId("lw-about-model").textContent = kind || told || t`What else can be set follows from the kind of model.`;
    this.fit();
  }

  field(p) {
    const id = p.key === "output" ? "lw-output-output" : `lw-input-${p.key}`;
    const common = { id, "aria-description": p.help, "aria-errormessage": `lw-wrong-${p.key}` };
    const value = this.values[p.key];
    let control;
    if (p.kind === "switch") {
      control = make("input", { ...common, type: "checkbox", checked: value, onchange: (e) => this.set(p.key, e.target.checked) });
    } else if (p.kind === "choice") {
      control = make("select", { ...common, class: "lw-input", onchange: (e) => this.set(p.key, e.target.value) },
        ...p.choices.map((choice) => make("option", { value: choice, selected: choice === value }, choice)));
    } else if (p.kind === "lines") {
      control = make("textarea", { ...common, class: "lw-input", rows: 3, value, spellcheck: false,
        placeholder: p.blank ? t`empty: ${p.blank}` : "", oninput: (e) => this.set(p.key, e.target.value) });
    } else {
      control = make("input", { ...common, class: "lw-input", value, spellcheck: false, autocomplete: "off",
        placeholder: p.blank ? t`empty: ${p.blank}` : "", oninput: (e) => this.set(p.key, e.target.value) });
    }
    const is_path = ["file", "folder", "model"].includes(p.kind);
    if (is_path && p.kind !== "folder") control.setAttribute("list", p.kind === "model" ? "lw-models" : "lw-loras");
    return this.frame(p, id, is_path ? this.withBrowse(p, control, (path) => this.set(p.key, path)) : control);
  }

  frame(p, id, ...controls) {
    const help = make("button", { class: "lw-help", type: "button", "aria-label": t`Help for ${p.label}` }, "?");
    const open = () => this.form.explain(p, help), close = () => { this.form.tip.hidden = true; };
    for (const [name, act] of Object.entries({ mouseenter: open, focus: open, click: open, mouseleave: close, blur: close })) help.addEventListener(name, act);
    return make("div", { class: `lw-option lw-option-${p.kind}`, id: `lw-option-${p.key}` },
      make("label", { htmlFor: id }, p.label), help, ...controls,
      make("p", { class: "lw-facts", id: `lw-about-${p.key}` }), make("p", { class: "lw-wrong", id: `lw-wrong-${p.key}` }));
  }

  withBrowse(p, control, take) {
    const at = { type: (_, path) => { control.value = path; take(path); }, input: () => control, get entries() { return { [p.key]: control.value }; } };
    return make("span", { class: "lw-path" }, control, make("button", { class: "lw-button", type: "button",
      "aria-label": t`Browse for ${p.label}`, onclick: () => browse(at, { ...p, kind: p.kind === "lines" ? "file" : p.kind }, this.server) }, "…"));
  }

  loras(p) {
    const strengths = this.tool.fields.find((other) => other.key === "strengths"), { rows } = this;
    const store = () => this.set("loras", rows.map(([path]) => path).join("\n"));
    const again = () => { store(); byId("lw-option-loras").replaceWith(this.loras(p)); };
    const row = (entry, i) => {
      const path = make("input", { id: `lw-input-loras-${i}`, class: "lw-input", value: entry[0], spellcheck: false, autocomplete: "off",
        "aria-label": t`LoRA ${i + 1}`, "aria-errormessage": "lw-wrong-loras", oninput: (e) => { entry[0] = e.target.value; store(); } });
      path.setAttribute("list", "lw-loras");
      const number = strengths && make("input", { id: `lw-strength-${i}`, class: "lw-input lw-strength", value: entry[1], inputMode: "decimal", autocomplete: "off",
        "aria-label": t`Strength of LoRA ${i + 1}`, title: t`Strength`, "aria-description": strengths.help, "aria-errormessage": "lw-wrong-strengths",
        oninput: (e) => { entry[1] = e.target.value; } });
      const remove = make("button", { class: "lw-button", type: "button", "aria-label": t`Remove LoRA ${i + 1}`, disabled: rows.length === 1,
        onclick: () => { rows.splice(i, 1); again(); byId("lw-input-loras-0").focus(); } }, "×");
      return make("div", { class: "lw-lora" }, this.withBrowse(p, path, (value) => { entry[0] = value; store(); }), number, remove);
    };
    const add = make("button", { class: "lw-link", type: "button",
      onclick: () => { rows.push(["", "1"]); again(); byId(`lw-input-loras-${rows.length - 1}`).focus(); } }, t`Add a LoRA`);
    return this.frame(strengths ? { ...p, label: t`LoRAs and strengths`, help: `${p.help} ${strengths.help}` } : p, "lw-input-loras-0",
      ...rows.map(row), make("div", {}, add), make("p", { class: "lw-wrong", id: "lw-wrong-strengths" }));
  }

  mark(problems) {
    for (const node of byId("lw-tool-form").querySelectorAll(".lw-wrong")) node.textContent = "";
    for (const node of byId("lw-tool-form").querySelectorAll("[aria-invalid]")) node.removeAttribute("aria-invalid");
    const elsewhere = [];
    for (const p of problems) {
      const wrong = byId(`lw-wrong-${p.key}`);
      if (!wrong) { elsewhere.push(p); continue; }
      wrong.textContent = p.message;
      for (const node of p.at || [wrong.parentElement.querySelector("input, select, textarea")]) node?.setAttribute("aria-invalid", "true");
    }
    byId("lw-tool-form").querySelector("[aria-invalid]")?.focus();
    return elsewhere;
  }

  async run() {
    const kept = this.rows.map(([path, number], i) => ({ path, number, strength: strength(number), i })).filter(({ path }) => path.trim());
    const unread = "strengths" in this.values ? kept.filter((row) => !Number.isFinite(row.strength)) : [];
    if (unread.length) {
      const typed = unread.map(({ number }) => `“${number}”`).join(", ");
      this.mark([{ key: "strengths", message: t`${typed} cannot be a strength; type a number, as 0.8 or -1.`, at: unread.map(({ i }) => byId(`lw-strength-${i}`)) }]);
      return;
    }
    const entries = "loras" in this.values ? { ...this.values, loras: kept.map(({ path }) => path).join("\n"), strengths: kept.map((row) => row.strength).join(",") } : this.values;
    const shown = Object.fromEntries(this.tool.fields.filter((p) => !byId(`lw-option-${p.key}`)?.hidden).map((p) => [p.key, entries[p.key]]));
    const { problems } = await this.server.tool_start({ tool: this.tool.name, entries: shown });
    const elsewhere = this.mark(problems);
    if (problems.length) {
      this.show(elsewhere.map((p) => make("p", { class: "lw-wrong" }, sentence(`${p.label}: ${p.message}`))));
      return;
    }
    this.offset = 0;
    this.job = { tool: this.tool.name, state: "running" };
    this.tell();
    this.poll();
  }

  // Ask until the tool has ended; `once` only looks whether one is under way.
  async poll(once = false) {
    clearTimeout(this.timer);
    let answer;
    try {
      answer = await this.server.tool_poll({ offset: this.offset });
    } catch {
      byId("lw-tool-phase").textContent = t`The server does not answer; trying again …`;
      this.timer = setTimeout(() => this.poll(), 2000);
      return;
    }
    if (answer.state === "none") return;
    this.offset = answer.offset;
    const before = this.job?.tool === answer.tool ? this.job : {};
    this.job = { ...before, ...answer, findings: [...(before.findings || []), ...(answer.findings || [])] };
    if (once && answer.state === "running") this.choose(answer.tool);
    this.tell();
    if (!once && answer.state !== "running") byId("lw-tool-result").scrollIntoView({ block: "nearest", behavior: "smooth" });
    if (answer.state === "running") this.timer = setTimeout(() => this.poll(), 500);
  }

  // Show what the tool in view is doing or did.
  tell() {
    const job = this.job?.tool === this.tool.name ? this.job : null;
    const running = this.job?.state === "running";
    byId("lw-tool-run").disabled = running;
    byId("lw-tool-stop").hidden = !(running && job);
    const phase = byId("lw-tool-phase"), progress = byId("lw-tool-progress");
    progress.hidden = !(running && job);
    if (running && job) {
      const { name, done, total } = job.phase || { name: "starting" };
      phase.textContent = total ? t`${said(name)} … ${done} of ${total}` : `${said(name)} …`;
      if (total) Object.assign(progress, { max: total, value: done });
      else progress.removeAttribute("value");
    } else {
      phase.textContent = running ? t`${this.tools.get(this.job.tool).label} is running.` : "";
    }
    const found = job?.findings?.length ? [this.findings(job.findings)] : [];
    this.show(!job || running ? found : job.state === "done" ? [...found, ...this.report(job.report.report, job.picture)]
      : [...found, make("p", { class: job.state === "failed" ? "lw-wrong" : "" }, `${job.failed.message} ${job.failed.hint}`)]);
  }

  // What the check of this machine has found so far.
  findings(found) {
    const marks = { ok: ["✓", t`in order`], note: ["–", t`note`], wrong: ["✗", t`wrong`] };
    return make("div", { class: "lw-scroll lw-findings" },
      make("table", { class: "lw-table" }, make("tbody", {}, ...found.map((f) => make("tr", {},
        make("td", { class: `lw-finding lw-finding-${f.state}` }, make("span", { "aria-hidden": "true" }, marks[f.state]?.[0]), make("span", { class: "lw-unseen" }, marks[f.state]?.[1])),
        make("th", { scope: "row" }, f.what),
        make("td", {}, f.text, f.advice ? make("p", { class: f.state === "wrong" ? "lw-wrong" : "lw-facts" }, f.advice) : null))))));
  }

  show(nodes) { byId("lw-tool-result").replaceChildren(...nodes); }

  report(report, picture) {
    const again = report.preset && make("button", { class: "lw-button", type: "button",
      onclick: () => this.bar.order(async () => this.bar.take(await this.server.parse({ text: JSON.stringify(report.preset) }), t`The form holds what this LoRA says it was trained with.`)) },
    t`Train again from this LoRA`);
    const table = report.rows.length && make("div", { class: "lw-scroll", tabIndex: 0, role: "region", "aria-label": t`Details` },
      make("table", { class: "lw-table" },
        make("thead", {}, make("tr", {}, ...report.columns.map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...report.rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell)))))));
    const drawn = picture && make("button", { class: "lw-picture lw-drawing", type: "button", "aria-label": t`Show the picture large`,
      onclick: () => enlarged(this.tool.label, [fileAddress(picture), this.tool.label, ""], () => null) },
    make("img", { src: `${fileAddress(picture)}?${this.offset}`, alt: this.tool.label }));
    return [...report.lines.map((line) => make("p", {}, line)), ...report.warnings.map((line) => make("p", { class: "lw-note" }, line)), again, drawn, table].filter(Boolean);
  }
}
