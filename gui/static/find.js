// Finding a parameter by its label, its key, or a word of its help; a tool and what else has a tab the same way.

const MOST_FOUND = 12;
const ALSO = { vram: "memory", directory: "folder" }; // what others call it

class Finder {
  constructor(form, server, tools) {
    Object.assign(this, { form, server, tools });
    const tab = (label, help) => ({ label: said(label), key: "", help, tab: label, section: label, go: () => form.open(label) });
    this.places = [
      tab("Dataset", t`Images, captions, tags, repeats, buckets, crops, duplicates, damage, upload of a zip.`),
      tab("Config (JSON)", t`The settings as a preset: edit, paste, copy, open a preset's file; the command line.`),
      tab("Runs", t`Resume, repeat, files, download, delete, compare, queue, sweep, choose a checkpoint.`),
    ];
    this.box = byId("lw-find");
    this.list = byId("lw-found");
    this.box.addEventListener("input", () => this.show());
    this.box.addEventListener("focus", () => { this.show(); this.offerTools(); });
    this.box.addEventListener("blur", () => this.close());
    this.box.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("keydown", (event) => {
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") { event.preventDefault(); this.box.focus(); this.box.select(); }
    });
  }

  // The tools are asked for once, when something is first looked for.
  async offerTools() {
    if (this.asked) return;
    this.asked = true;
    try {
      const { tools } = await this.server.tools({});
      this.places.push(...tools.map(translated).map(({ name, label, group, summary }) =>
        ({ label, key: "", help: summary, tab: "Tools", section: group, go: () => this.tools.open(name) })));
      this.show();
    } catch {
      this.asked = false; // the live panel says that the server is away
    }
  }

  // All words must be there, where any has them all. Best first: what is the text, begins with it, has it in its label, its key, its help.
  find(text) {
    const wanted = text.trim().toLowerCase(), words = wanted.split(/\s+/);
    if (!wanted) return [];
    const rank = (p) => {
      const label = p.label.toLowerCase(), key = p.key.toLowerCase(), within = (place) => words.every((word) => place.includes(word) || place.includes(ALSO[word] ?? word));
      if ([label, key].includes(wanted)) return 0;
      if (label.startsWith(wanted) || key.startsWith(wanted)) return 1;
      if (within(label)) return 2;
      if (within(key)) return 3;
      return within(`${label} ${key} ${p.help}`.toLowerCase()) ? 4 : 5;
    };
    const all = [...this.form.table, ...this.places];
    const found = all.map((p) => [rank(p), p]).filter(([r]) => r < 5).sort(([a], [b]) => a - b);
    return (found.length ? found : this.alike(all, words)).map(([, p]) => p);
  }

  // What has all of the words but one: other programs call it otherwise ("LR # cycles"). Most in the label first.
  alike(all, words) {
    const count = (text) => words.filter((word) => text.toLowerCase().includes(word)).length;
    const near = words.length > 1 ? all.filter((p) => count(p.label) && count(`${p.label} ${p.key} ${p.help}`) === words.length - 1) : [];
    return near.map((p) => [count(p.label), p]).sort(([a], [b]) => b - a);
  }

  show() {
    this.found = this.find(this.box.value);
    this.at = this.found.length ? 0 : -1;
    const more = this.found.length - MOST_FOUND;
    this.found = this.found.slice(0, MOST_FOUND);
    const place = (p) => (p.tab === p.section ? said(p.tab) : `${said(p.tab)} › ${said(p.section)}`);
    this.list.replaceChildren(
      ...this.found.map((p, i) => make("li", { id: `lw-found-${i}`, role: "option", onmousedown: (event) => { event.preventDefault(); this.take(p); } },
        make("b", {}, p.label), " ", p.key && make("code", {}, p.key), make("span", { class: "lw-facts" }, place(p)))),
      ...(this.box.value.trim() && !this.found.length ? [make("li", { class: "lw-facts", role: "option", "aria-disabled": "true" }, t`Nothing found.`)] : []),
      ...(more > 0 ? [make("li", { class: "lw-facts", role: "option", "aria-disabled": "true" }, t`and ${more} more`)] : []));
    this.list.hidden = !this.list.childElementCount;
    this.box.setAttribute("aria-expanded", String(!this.list.hidden));
    this.mark();
  }

  mark() {
    [...this.list.children].forEach((line, i) => line.setAttribute("aria-selected", String(i === this.at)));
    if (this.at < 0) this.box.removeAttribute("aria-activedescendant");
    else this.box.setAttribute("aria-activedescendant", `lw-found-${this.at}`);
    this.list.children[this.at]?.scrollIntoView({ block: "nearest" });
  }

  close() {
    this.list.hidden = true;
    this.box.setAttribute("aria-expanded", "false");
    this.box.removeAttribute("aria-activedescendant");
  }

  key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && this.found?.length) {
      this.at = (this.at + step + this.found.length) % this.found.length;
      this.mark();
    } else if (event.key === "Enter" && this.found?.[this.at]) {
      this.take(this.found[this.at]);
    } else if (event.key === "Escape") {
      this.box.value = "";
      this.show();
    } else return;
    event.preventDefault();
  }

  take(p) {
    this.box.value = "";
    this.close();
    if (p.go) p.go(); else this.form.focus(p.key);
  }
}
