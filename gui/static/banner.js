// The banner under the bar: what is wrong, what became of a preset, what is going on.

class Banner {
  constructor(node, form) {
    this.node = node;
    this.form = form;
  }

  clear() {
    this.node.replaceChildren();
    this.node.className = "";
    this.about = this.until = null;
  }

  // The banner's errors are about these entries; `titled` says how many there are.
  blames(entries, titled) { this.about = { entries, titled }; }

  // Lines about entries that were changed since are no longer so; with the last error the banner goes.
  outdate(entries) {
    if (!this.about) return;
    for (const line of this.node.querySelectorAll("li")) {
      const key = line.querySelector("[data-key]")?.dataset.key;
      if (key && entries[key] !== this.about.entries[key]) line.remove();
    }
    const left = this.node.querySelectorAll(".lw-tag-error").length;
    if (left) this.node.querySelector("strong").textContent = this.about.titled(left);
    else this.clear();
  }

  // What it tells holds until then; without a word it holds until something else is told.
  over(...what) { if (what.includes(this.until)) this.clear(); }

  busy(text) {
    this.show("busy", text);
  }

  // `tone`: error, warning, info, good or busy. `items`: problems and notes; `actions`: [label, function];
  // `aside`: what follows the title in a quieter voice.
  show(tone, title, items = [], actions = [], aside = "") {
    this.node.className = `lw-banner-${tone}`;
    this.about = this.until = null;
    const close = make("button", { class: "lw-close", type: "button", "aria-label": t`Dismiss`, onclick: () => this.clear() }, "×");
    const head = make("div", { class: "lw-banner-head" },
      tone === "busy" ? make("span", { class: "lw-spinner", "aria-hidden": "true" }) : null,
      make("span", {}, make("strong", {}, title), " ", aside),
      ...actions.map(([label, act]) => make("button", { class: "lw-link", type: "button", onclick: act }, label)),
      make("span", { class: "lw-gap" }),
      tone === "busy" ? null : close);
    const changes = items.some((item) => item.severity === "changed");
    const list = items.length ? make("ul", { class: changes ? "lw-columns" : "" }, ...items.map((item) => this.line(item))) : null;
    this.node.replaceChildren(head, ...(list ? [list] : []));
  }

  line(item) {
    const place = item.severity || item.what;
    const tag = make("span", { class: `lw-tag lw-tag-${place.replaceAll(" ", "-")}` }, said(place));
    const label = item.label || item.key;
    const control = this.form.known(item.key)
      ? make("button", { class: "lw-link lw-control", type: "button", "data-key": item.key, onclick: () => this.form.focus(item.key) },
        this.form.label(item.key))
      : label ? make("b", {}, label) : null;
    const [does, act, name] = item.act || [];
    return make("li", {}, tag, " ", control, control ? " " : "", item.message,
      ...(act ? [" ", make("button", { class: "lw-link lw-small", type: "button", "aria-label": name, onclick: act }, does)] : []));
  }
}
