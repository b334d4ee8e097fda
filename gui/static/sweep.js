// A small sweep: one run for every combination of values of one or two parameters, from the form as it stands.

class Sweep {
  constructor(form, server, bar, list) {
    Object.assign(this, { form, server, bar, list });
    // The tab is built when it is first opened.
    document.addEventListener("input", (event) => { if (event.target.closest?.("#lw-sweep")) { this.tell(); this.bar.banner.over("done"); } });
    document.addEventListener("submit", (event) => {
      if (event.target.id !== "lw-sweep-form") return;
      event.preventDefault();
      this.bar.order(() => this.start());
    });
    document.addEventListener("focusin", (event) => { if (event.target.list?.id === "lw-sweep-keys") this.offer(); });
  }

  offer() {
    const list = byId("lw-sweep-keys");
    if (list.childElementCount) return;
    list.append(...this.form.table.filter((p) => p.key !== "output_name" && !["secret", "lines"].includes(p.kind))
      .map((p) => make("option", { value: p.label, label: `${p.tab} · ${p.key}` })));
  }

  // The parameter that is meant: by its label or key.
  chosen(i) {
    const text = byId(`lw-sweep-field-${i}`).value.trim().toLowerCase();
    return text ? this.form.table.find((p) => [p.label.toLowerCase(), p.key.toLowerCase()].includes(text)) : null;
  }

  values(i) {
    const text = byId(`lw-sweep-values-${i}`).value;
    return [...new Set(text.split(text.includes(";") ? ";" : ",").map((word) => word.trim()).filter(Boolean))];
  }

  tell() {
    let runs = 1, wrong = false;
    for (const i of [1, 2]) {
      const p = this.chosen(i), typed = byId(`lw-sweep-field-${i}`).value.trim();
      byId(`lw-sweep-about-${i}`).textContent = p?.kind === "text" ? t`in the form: ${this.form.spoken(this.form.entries[p.key])}`
        : p ? t`${p.allowed}; in the form: ${this.form.spoken(this.form.entries[p.key])}` : typed ? t`No parameter has this label or key.` : "";
      wrong ||= Boolean(typed) !== Boolean(p) || (!p && Boolean(byId(`lw-sweep-values-${i}`).value.trim()));
      if (p) runs *= this.values(i).length;
    }
    for (const i of [1, 2]) {
      const p = this.chosen(i), told = byId(`lw-sweep-told-${i}`), count = this.values(i).length;
      const lacking = byId(`lw-sweep-values-${i}`).value.trim() && (!p ? t`Of which parameter? Enter its label or key.` : !count ? t`There is no value here.` : runs === 1 && t`One value only: enter at least two that differ.`);
      told.className = lacking ? "lw-wrong" : "lw-facts";
      told.textContent = lacking || (p?.kind === "text" ? t`with semicolons between, as in 512,512; 768,768` : t`with commas between`);
    }
    const ready = !wrong && runs >= 2 && runs <= MOST_COMPARED;
    byId("lw-sweep-start").disabled = !ready;
    byId("lw-sweep-start").textContent = ready ? t`Check and queue ${counted(runs, "run")}` : t`Check and queue`;
    byId("lw-sweep-note").textContent = runs > MOST_COMPARED ? t`These make ${runs} runs; ${MOST_COMPARED} is the most.` : "";
  }

  async start() {
    const fields = [1, 2].filter((i) => this.chosen(i)).map((i) => [this.chosen(i).key, byId(`lw-sweep-values-${i}`).value]);
    this.bar.banner.busy(t`Checking every combination …`);
    const answer = await this.server.sweep({ ...await this.bar.shown(), fields });
    this.bar.tell(answer, t`${answer.runs} runs are in the queue and start one after the other. Press Sweep at any of them for the table.`, [], true);
    await this.list.again();
  }
}
