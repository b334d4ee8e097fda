// Runs side by side: their losses on one chart, what came of them, their samples step by step, the settings that differ.

const HUES = ["--lw-accent", "--lw-mark", "--lw-green", "--lw-red", "--lw-text", "--lw-muted"];
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3], [14, 5], [1, 6], [4, 2], [16, 3, 3, 3]];
const MOST_COMPARED = 24, MOST_COLUMNS = 4;

class Compare {
  constructor(form, server, live) {
    Object.assign(this, { form, server, live, runs: [] });
  }

  async show(ids) {
    this.runs = (await this.server.compare({ runs: ids })).runs;
    this.keys = this.differing();
    this.pointer = null;
    const last = this.runs.flatMap((run) => run.curve.slice(-1)), first = this.runs.flatMap((run) => run.curve.slice(0, 1));
    this.first = Math.min(...first.map(([step]) => step));
    this.last = Math.max(...last.map(([step]) => step));
    this.canvas = make("canvas", { class: "lw-curves", tabIndex: 0, role: "slider", "aria-label": t`Step at which the losses are read` });
    this.canvas.setAttribute("aria-valuemin", String(last.length ? this.first : 0));
    this.canvas.setAttribute("aria-valuemax", String(last.length ? this.last : 0));
    this.readouts = this.runs.map(() => make("span", { class: "lw-read" }));
    byId("lw-compare").replaceChildren(make("section", { class: "section", "aria-label": t`Comparison` },
      make("div", { class: "lw-row lw-heading" }, make("h3", {}, t`Average loss`), make("span", { class: "lw-gap" }),
        make("button", { class: "lw-close", type: "button", "aria-label": t`Close the comparison`, onclick: () => this.close() }, "×")),
      make("ul", { class: "lw-legend" }, ...this.runs.map((run, i) => make("li", {}, this.swatch(i), `${this.called(run)} · `, this.readouts[i]))),
      this.canvas, make("h3", {}, t`Results`), this.results(), make("h3", {}, t`Samples`), ...this.samples(),
      ...(this.keys.length > MOST_COLUMNS ? [make("h3", {}, t`Settings that differ`), this.settings()] : [])));
    this.listen();
    redrawn(this.canvas, () => { if (this.canvas.isConnected) this.draw(); });
    byId("lw-compare").scrollIntoView({ block: "start", behavior: "smooth" });
  }

  close() {
    this.runs = [];
    byId("lw-compare").replaceChildren();
  }

  // The folder's name is told only where two runs have the same.
  called({ run }) {
    return this.runs.filter((other) => other.run.slice(16) === run.slice(16)).length > 1 ? run : run.slice(16);
  }

  look(i) { return { hue: HUES[i % HUES.length], dash: DASHES[Math.floor(i / 3) % DASHES.length] }; }

  swatch(i) {
    const { hue, dash } = this.look(i), colours = [];
    let at = 0;
    for (const [k, length] of dash.entries()) colours.push(`${k % 2 ? "transparent" : `var(${hue})`} ${at}px ${at += length}px`);
    return make("span", { class: "lw-swatch", style: dash.length ? `background: repeating-linear-gradient(90deg, ${colours.join(", ")})` : `background: var(${hue})` });
  }

  // The curves are read with the pointer, a finger, or the arrow keys.
  listen() {
    const canvas = this.canvas, at = (step) => { this.pointer = step === null ? null : Math.round(Math.min(this.last, Math.max(this.first, step))); this.draw(); };
    const under = (event) => at(this.box ? this.first + ((event.offsetX - this.box.left) / (this.box.right - this.box.left)) * (this.last - this.first) : null);
    canvas.addEventListener("pointerdown", under);
    canvas.addEventListener("pointermove", under);
    canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") at(null); });
    canvas.addEventListener("keydown", (event) => {
      const gap = Math.max(1, Math.round((this.last - this.first) / 50)), now = this.pointer ?? this.last;
      const target = { ArrowLeft: now - gap, ArrowDown: now - gap, ArrowRight: now + gap, ArrowUp: now + gap, Home: this.first, End: this.last, Escape: null }[event.key];
      if (target === undefined) return;
      event.preventDefault();
      at(target);
    });
  }

  draw() {
    const { pen, width, height, colour } = fresh(this.canvas);
    const all = this.runs.flatMap((run) => run.curve);
    if (!all.length) for (const node of this.readouts) node.textContent = t`no steps`;
    if (!width || !all.length) return;
    const { box, x, y } = axes(pen, width, height, colour, this.first, this.last, all.map(([, loss]) => loss));
    this.box = box;
    if (this.pointer !== null) {
      pen.strokeStyle = colour("--lw-muted");
      pen.beginPath(); pen.moveTo(x(this.pointer), box.top); pen.lineTo(x(this.pointer), box.bottom); pen.stroke();
    }
    const told = this.runs.map(({ curve }, i) => {
      if (!curve.length) return t`no steps`;
      const { hue, dash } = this.look(i), steps = curve.map(([step]) => step);
      pen.strokeStyle = pen.fillStyle = colour(hue);
      pen.lineWidth = 2;
      pen.setLineDash(dash);
      trace(pen, steps, curve.map(([, loss]) => loss), x, y);
      pen.setLineDash([]);
      const [step, loss] = curve[nearest(steps, this.pointer ?? this.last)];
      if (this.pointer !== null) { pen.beginPath(); pen.arc(x(step), y(loss), 3.5, 0, 7); pen.fill(); }
      return t`${loss.toPrecision(3)} at step ${step}`;
    });
    told.forEach((words, i) => { this.readouts[i].textContent = words; });
    this.canvas.setAttribute("aria-valuenow", String(this.pointer ?? this.last));
    this.canvas.setAttribute("aria-valuetext", told.map((words, i) => `${this.called(this.runs[i])}: ${words}`).join("; "));
  }

  // The parameters in which these runs differ; their names do where nothing else says which is which.
  differing() {
    const known = this.runs.filter((run) => run.entries);
    const keys = new Set(known.flatMap((run) => this.form.differing(known[0].entries, run.entries).map((p) => p.key)));
    keys.delete("output_name");
    return this.form.table.filter((p) => keys.has(p.key));
  }

  spoken(run, p) { return run.entries ? this.form.spoken(run.entries[p.key]) : t`cannot be read`; }

  // One line a run: what it had otherwise, and what came of it. The lowest of each loss stands out.
  results() {
    const columns = this.keys.length <= MOST_COLUMNS ? this.keys : [];
    const best = (name) => Math.min(...this.runs.map(({ outcome }) => outcome[name]?.[1] ?? Infinity));
    const lowest = { last: best("last"), lowest: best("lowest") };
    const loss = ({ outcome }, name) => make("td", { class: "lw-number" }, outcome[name] ? make(outcome[name][1] === lowest[name] ? "b" : "span", {}, outcome[name][1].toPrecision(3)) : "–",
      outcome[name] ? make("div", { class: "lw-facts" }, t`step ${outcome[name][0]}`) : "");
    const sample = (run) => run.samples[run.samples.length - 1];
    return this.table(t`Results`, [t`Run`, ...columns.map((p) => p.label), t`Last loss`, t`Lowest loss`, t`Time with loading`, t`File`, t`Last sample`],
      this.runs.map((run, i) => make("tr", {}, make("th", { scope: "row" }, this.swatch(i), this.called(run)),
        ...columns.map((p) => make("td", {}, this.spoken(run, p))), loss(run, "last"), loss(run, "lowest"),
        make("td", { class: "lw-number" }, run.outcome.seconds ? duration(run.outcome.seconds) : "–"),
        make("td", {}, run.outcome.file ? make("button", { class: "lw-link lw-small", type: "button", "aria-label": t`Download ${run.outcome.file} of ${run.run}`,
          onclick: () => this.live.download(run.outcome.file, run.run) }, `↓ ${run.outcome.file}`) : "–"),
        make("td", {}, sample(run) ? this.picture(run, sample(run)) : "–"))));
  }

  settings() {
    return this.table(t`Settings that differ`, ["", ...this.runs.map((run) => this.called(run))],
      this.keys.map((p) => make("tr", {}, make("th", { scope: "row" }, p.label), ...this.runs.map((run) => make("td", {}, this.spoken(run, p))))));
  }

  // A slider over the steps of all; a row a run, a column a prompt. A run shows its newest picture up to that step.
  samples() {
    this.prompts = [...new Set(this.runs.flatMap((run) => run.samples.map((sample) => sample.prompt)))];
    if (!this.prompts.length) return [make("p", { class: "lw-facts" }, t`None of these runs drew samples.`)];
    this.steps = [...new Set(this.runs.flatMap((run) => run.samples.map((sample) => sample.step)))].sort((a, b) => a - b);
    const most = this.steps.length - 1, where = make("output", { class: "lw-facts" }), grid = make("div", {});
    const show = () => {
      this.at = this.steps[slider.value];
      slider.setAttribute("aria-valuetext", where.textContent = this.at === 0 ? t`before training` : t`up to step ${this.at}`);
      grid.replaceChildren(this.table(t`Samples`, [t`Run`, ...this.prompts], this.runs.map((run) => make("tr", {}, make("th", { scope: "row" }, this.called(run)),
        ...this.prompts.map((prompt) => make("td", {}, this.found(run, prompt) ? this.picture(run, this.found(run, prompt), true) : "–"))))));
    };
    const slider = make("input", { type: "range", min: 0, max: most, disabled: !most, "aria-label": t`Step of the samples compared`, oninput: show });
    slider.value = String(most);
    show();
    return [make("div", { class: "lw-row lw-heading lw-steps" }, slider, where), grid];
  }

  found(run, prompt) { return run.samples.filter((sample) => sample.prompt === prompt && sample.step <= this.at).pop(); }

  picture(run, sample, walks = false) {
    const told = (of, one) => [fileAddress(one.path), `${one.prompt}, ${of.run}`, t`${of.run} · step ${one.step} · seed ${one.seed} · ${one.prompt}`];
    let row = this.runs.indexOf(run), column = this.prompts?.indexOf(sample.prompt) ?? 0;
    const next = (right, down) => {
      const found = walks && this.runs[row + down] && this.prompts[column + right] && this.found(this.runs[row + down], this.prompts[column + right]);
      if (!found) return null;
      [row, column] = [row + down, column + right];
      return told(this.runs[row], found);
    };
    return make("figure", {}, make("button", { class: "lw-picture", type: "button", "aria-label": t`${sample.prompt}, ${run.run}, step ${sample.step}, open large`,
      onclick: () => enlarged(t`Sample`, told(run, sample), next) }, make("img", { src: fileAddress(sample.path), alt: `${sample.prompt}, ${run.run}`, loading: "lazy" })),
    make("figcaption", { class: "lw-facts" }, t`step ${sample.step}`));
  }

  table(label, columns, rows) {
    return make("div", { class: "lw-scroll", tabIndex: 0, role: "region", "aria-label": label }, make("table", { class: "lw-table" },
      make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)))),
      make("tbody", {}, ...rows)));
  }
}
