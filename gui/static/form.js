// The form: reading and filling Gradio's widgets, what is hidden, what differs, what is wrong, help.

// A text as a string of the style sheet.
const quoted = (text) => JSON.stringify(text.replace(/\s+/g, " "));

class Form {
  constructor(table, ask_server) {
    this.table = table.map(translated);
    this.parameters = new Map(this.table.map((p) => [p.key, p]));
    this.server = ask_server;
    this.entries = Object.fromEntries(this.table.map((p) => [p.key, p.default]));
    this.kept = {};
    this.errors = new Map();
    this.remarks = new Map();
    this.forced = new Set();
    this.found = new Map();
    this.readers = [];
    this.fillers = [];
    this.whenChanged = [];
    this.resetting = () => {};
    this.style = document.head.appendChild(make("style", { id: "lw-form-state" }));
    this.models = [];
  }

  known(key) { return this.parameters.has(key); }
  label(key) { return this.parameters.get(key)?.label || key; }

  // Gradio's hidden buttons answer into these two.
  attach() {
    window.lorawright = {
      filling: () => this.pending,
      read: (values) => { for (const resolve of this.readers.splice(0)) resolve(this.named(values)); return []; },
      filled: (values) => { for (const resolve of this.fillers.splice(0)) resolve(this.named(values)); return []; },
    };
    const later = (event) => {
      if (["lw-read", "lw-fill"].includes(event.target.id)) return; // or each look would call for the next
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.look(), 120);
    };
    for (const name of ["input", "change", "click", "keyup", "focusout"]) document.addEventListener(name, later, true);
    // Gradio's dropdown opens its list on any key, Tab too, which arrives there after the list was closed.
    window.addEventListener("keydown", (event) => {
      if (event.key === "Tab" && event.target.role === "combobox") event.stopPropagation();
    }, true);
    this.tip = document.body.appendChild(make("div", { id: "lw-tip", role: "tooltip", hidden: true }));
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") this.tip.hidden = true; });
    new MutationObserver(() => this.dress()).observe(byId("form"), { childList: true, subtree: true });
    this.dress();
  }

  named(values) {
    return Object.fromEntries(this.table.map((p, i) => [p.key, values[i] ?? (p.kind === "switch" ? false : "")]));
  }

  async read() {
    const button = await whenThere(() => byId("lw-read"));
    return new Promise((resolve) => { this.readers.push(resolve); button.click(); });
  }

  // Fill every widget; resolves when all of them show it.
  async fill(entries, kept = {}) {
    this.kept = kept;
    this.pending = this.table.map((p) => entries[p.key] ?? p.default);
    const pick = this.table.findIndex((p) => p.key === "model_list");
    if (pick >= 0) {
      const choices = [["custom", "custom"], ["embedded", "embedded"], ...this.models.map((path) => [this.modelName(path), path])];
      this.pending[pick] = { __type__: "update", value: this.pending[pick], choices };
    }
    const button = await whenThere(() => byId("lw-fill"));
    const done = new Promise((resolve) => { this.fillers.push(resolve); button.click(); });
    this.forced.clear();
    this.settle(await done);
  }

  // Look at the form after anything that may have changed it.
  async look() {
    if (!byId("lw-read")) return;
    const entries = await this.read();
    const picked = entries.model_list !== this.entries.model_list;
    if (this.table.some((p) => entries[p.key] !== this.entries[p.key])) this.settle(entries);
    await this.matchPick(picked);
  }

  settle(entries) {
    this.entries = entries;
    this.paint();
    for (const tell of this.whenChanged) tell();
  }

  // A model by its place in the folder of models, where that tells it from the others.
  modelName(path) {
    const name = (p) => p.split(/[\\/]models[\\/]/).pop();
    return this.models.filter((other) => name(other) === name(path)).length === 1 ? name(path) : path;
  }

  // Quick Pick fills the path; a path given otherwise makes the pick "custom" again, once it is typed, also one that
  // a preset brought and that is not offered here.
  async matchPick(picked) {
    const key = "pretrained_model_name_or_path", pick = this.entries.model_list;
    const wanted = pick === "embedded" ? "" : pick;
    if (!pick || pick === "custom" || this.entries[key] === wanted) return;
    if (picked && [...this.models, "embedded"].includes(pick)) this.type(key, wanted);
    else if (document.activeElement !== this.input(key)) await this.fill({ ...this.entries, model_list: "custom" }, this.kept);
  }

  type(key, text) {
    const input = this.input(key);
    if (!input) return this.fill({ ...this.entries, [key]: text }, this.kept); // its tab was never opened
    input.value = text;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  }

  applies(p) {
    return Object.entries(p.when).every(([other, values]) => values.includes(this.entries[other]));
  }

  // Whether two entries mean the same: 1e-4 is 0.0001, and a number left blank is the default, unless
  // blank has a meaning of its own.
  same(p, one, other) {
    if (p.kind === "switch") return one === other;
    const numeric = p.kind === "integer" || p.kind === "number";
    const [a, b] = [one, other].map((entry) => entry.trim() || (numeric && p.blank === null ? p.default.trim() : ""));
    return a === b || (numeric && a !== "" && b !== "" && Number(a) === Number(b));
  }

  // The parameters whose entry differs between two forms; what one does not name has its default there.
  differing(before, after) {
    return this.table.filter((p) => p.kind !== "secret" && !this.same(p, before[p.key] ?? p.default, after[p.key] ?? p.default));
  }

  changed() { return this.table.filter((p) => !this.same(p, this.entries[p.key], p.default)); }

  paint() {
    const id = (p) => `#field-${p.key}`;
    const away = this.table.filter((p) => !this.applies(p) && !this.forced.has(p.key)).map(id);
    const differs = this.changed().map(id);
    const wrong = [...this.errors].map(([key, message]) =>
      `#field-${key}{--lw-field:var(--lw-red)}#field-${key}::after{content:${quoted(message)}}`);
    const remarks = [...this.remarks].filter(([key]) => !this.errors.has(key)).map(([key, text]) =>
      `#field-${key}::after{--lw-red:var(--lw-muted);content:${quoted(text)}}`);
    this.style.textContent = [
      away.length ? `${away.join(",")}{display:none!important}` : "",
      differs.length ? `${differs.map((one) => `${one} .lw-dot`).join(",")}{display:block}` : "",
      ...remarks,
      ...wrong,
    ].join("\n");
    for (const p of this.table) this.input(p.key)?.toggleAttribute("aria-invalid", this.errors.has(p.key));
  }

  // What the schema finds wrong, shown at the fields while they are being filled.
  mark(problems) {
    this.errors = new Map(problems.filter((p) => p.severity === "error" && this.known(p.key)).map((p) => [p.key, p.message]));
    for (const [key, { message, entry }] of this.found) if (!this.errors.has(key) && this.entries[key] === entry) this.errors.set(key, message);
    this.paint();
  }

  // What takes longer to find, as what is wrong with a path, stays marked until its entry is another. Nothing is
  // wrong with a field that was not filled in yet.
  markFound(problems) {
    for (const [key, { message }] of this.found) if (this.errors.get(key) === message) this.errors.delete(key);
    const filled = problems.filter((p) => p.severity === "error" && this.known(p.key) && this.entries[p.key] !== "");
    this.found = new Map(filled.map((p) => [p.key, { message: p.message, entry: this.entries[p.key] }]));
    for (const [key, { message }] of this.found) if (!this.errors.has(key)) this.errors.set(key, message);
    this.paint();
  }

  // What is to say of a field's entry where nothing is wrong with it, shown below it; "" for nothing.
  remark(key, text) {
    if (text) this.remarks.set(key, text); else this.remarks.delete(key);
    this.paint();
  }

  input(key) { return byId(`field-${key}`)?.querySelector("input, textarea"); }

  async focus(key) {
    const p = this.parameters.get(key);
    if (!this.applies(p)) { this.forced.add(key); this.paint(); }
    if (!this.input(key)?.offsetParent) await this.open(p.tab);
    const input = await whenThere(() => this.input(key)?.offsetParent && this.input(key));
    input.scrollIntoView({ block: "center" });
    input.focus({ preventScroll: true });
    const field = byId(`field-${key}`);
    field.animate([{ outline: "2px solid var(--lw-accent)", outlineOffset: "4px" }, { outline: "2px solid transparent", outlineOffset: "4px" }], 1200);
  }

  async open(tab) {
    if (["Basic", "Advanced"].includes(tab)) await this.press(said("Parameters"));
    await this.press(said(tab));
  }

  async press(label) {
    const button = await whenThere(() => [...document.querySelectorAll("#form [role=tab]")].find((tab) => tab.textContent.trim() === label));
    if (button.getAttribute("aria-selected") !== "true") button.click();
  }

  // Give fields that have just been built their help, and paths their browse button.
  dress() {
    for (const field of document.querySelectorAll("#form .field:not([data-dressed])")) {
      const p = this.parameters.get(field.id.replace("field-", ""));
      const input = field.querySelector("input, textarea");
      if (!p || !input) continue;
      field.dataset.dressed = "";
      input.setAttribute("aria-description", p.help);
      input.spellcheck = p.kind === "lines";
      input.autocomplete = "off";
      // For the mouse and for touch; with the keyboard help opens from the field itself, so that the
      // way through the form has one stop a field.
      const help = make("button", { class: "lw-help", type: "button", tabIndex: -1, title: t`F1 in the field`, "aria-label": t`Help for ${p.label}` }, "?");
      const open = () => this.explain(p, help);
      const close = () => { this.tip.hidden = true; };
      help.addEventListener("mouseenter", open);
      help.addEventListener("click", open);
      help.addEventListener("mouseleave", close);
      help.addEventListener("blur", close);
      input.setAttribute("aria-keyshortcuts", "F1");
      input.addEventListener("keydown", (event) => {
        if (event.key !== "F1") return;
        event.preventDefault();
        if (this.tip.hidden) this.explain(p, field); else close();
      });
      input.addEventListener("blur", close);
      const dot = make("button", { class: "lw-dot", type: "button", tabIndex: -1, "aria-label": t`Reset ${p.label}`,
        title: t`Changed. Back to the default: ${this.spoken(p.default)}`, onclick: () => this.resetting(p) });
      field.append(help, dot);
      if (["file", "folder", "model"].includes(p.kind)) {
        field.append(make("button", { class: "lw-browse", type: "button", "aria-label": t`Browse for ${p.label}`,
          onclick: () => browse(this, p, this.server) }, "…"));
        if (p.kind === "model") {
          input.setAttribute("list", "lw-models");
        }
      }
    }
    this.paintLater ??= requestAnimationFrame(() => { this.paintLater = undefined; this.paint(); });
  }

  // An entry in words.
  spoken(entry) {
    if (typeof entry === "boolean") return entry ? t`on` : t`off`;
    return entry === "" ? t`empty` : entry.length > 60 ? `${entry.slice(0, 60)}…` : entry;
  }

  explain(p, at) {
    const wrong = this.errors.get(p.key);
    this.tip.replaceChildren(
      make("p", {}, p.help),
      wrong ? make("p", { class: "lw-wrong" }, wrong) : "",
      make("p", { class: "lw-facts" }, p.allowed === said("text") || p.kind === "choice" ? "" : `${p.allowed} · `, t`default: ${this.spoken(p.default)}`, " · ", make("code", {}, p.key)));
    this.tip.hidden = false;
    const spot = at.getBoundingClientRect(), size = this.tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, spot.right - size.width), innerWidth - size.width - 8);
    const below = spot.bottom + 6;
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${below + size.height > innerHeight ? Math.max(8, spot.top - size.height - 6) : below}px`;
  }
}
