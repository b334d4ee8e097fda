// Runs side by side: their losses on one chart, the settings that differ, their last samples.

const HUES = ["--lw-accent", "--lw-mark", "--lw-green", "--lw-red", "--lw-text", "--lw-muted"];

class Compare {
  constructor(form, server) {
    Object.assign(this, { form, server, runs: [] });
  }

  async show(ids) {
    this.runs = (await this.server.compare({ runs: ids })).runs;
    const names = this.runs.map(({ run }) => run);
    const canvas = make("canvas", { class: "lw-curves", role: "img", "aria-label": `Loss of ${names.join(", ")}` });
    byId("lw-compare").replaceChildren(make("section", { class: "section", "aria-label": "Comparison" },
      make("div", { class: "lw-row lw-heading" }, make("h3", {}, "Loss"), make("span", { class: "lw-gap" }),
        make("button", { class: "lw-close", type: "button", "aria-label": "Close the comparison", onclick: () => byId("lw-compare").replaceChildren() }, "×")),
      make("ul", { class: "lw-legend" }, ...this.runs.map((run, i) => make("li", {}, make("span", { style: `border-top: 3px ${i > 2 ? "dashed" : "solid"} var(${HUES[i]})` }),
        `${run.run}${run.curve.length ? ` · ${run.curve[run.curve.length - 1][1].toPrecision(3)} at step ${run.curve[run.curve.length - 1][0]}` : " · no steps"}`))),
      canvas, make("h3", {}, "Settings that differ"), this.settings(), make("h3", {}, "Last samples"), this.samples()));
    redrawn(canvas, () => { if (canvas.isConnected) this.draw(canvas); });
    byId("lw-compare").scrollIntoView({ block: "start", behavior: "smooth" });
  }

  draw(canvas) {
    const { pen, width, height, colour } = fresh(canvas);
    const all = this.runs.flatMap((run) => run.curve);
    if (!width || !all.length) return;
    const steps = all.map(([step]) => step);
    const { x, y } = axes(pen, width, height, colour, Math.min(...steps), Math.max(...steps), all.map(([, loss]) => loss));
    pen.lineWidth = 2;
    this.runs.forEach(({ curve }, i) => {
      pen.strokeStyle = colour(HUES[i]);
      pen.setLineDash(i > 2 ? [6, 4] : []);
      if (curve.length) trace(pen, curve.map(([step]) => step), curve.map(([, loss]) => loss), x, y);
    });
  }

  settings() {
    const known = this.runs.filter((run) => run.entries);
    const keys = new Set(known.flatMap((run) => this.form.differing(known[0].entries, run.entries)));
    const rows = this.form.table.filter((p) => keys.has(p)).map((p) => make("tr", {}, make("th", { scope: "row" }, p.label),
      ...this.runs.map((run) => make("td", {}, run.entries ? this.form.spoken(run.entries[p.key]) : "cannot be read"))));
    if (!rows.length) return make("p", { class: "lw-facts" }, "None: these runs have the same settings.");
    return this.table(rows);
  }

  samples() {
    const prompts = [...new Set(this.runs.flatMap((run) => run.samples.map((sample) => sample.prompt)))];
    if (!prompts.length) return make("p", { class: "lw-facts" }, "None of these runs drew samples.");
    const cell = (run, prompt) => {
      const found = run.samples.find((sample) => sample.prompt === prompt);
      return make("td", {}, found ? make("figure", {}, make("img", { src: fileAddress(found.path), alt: `${prompt}, ${run.run}`, loading: "lazy" }),
        make("figcaption", { class: "lw-facts" }, `step ${found.step} · seed ${found.seed}`)) : "–");
    };
    return this.table(prompts.map((prompt) => make("tr", {}, make("th", { scope: "row" }, prompt), ...this.runs.map((run) => cell(run, prompt)))));
  }

  table(rows) {
    return make("div", { class: "lw-scroll", tabIndex: 0, role: "region", "aria-label": "Comparison" }, make("table", { class: "lw-table" },
      make("thead", {}, make("tr", {}, make("td", {}), ...this.runs.map(({ run }) => make("th", { scope: "col" }, run)))),
      make("tbody", {}, ...rows)));
  }
}
