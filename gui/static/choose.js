// Choosing among a run's saved files: the same prompts and seeds at every strength, side by side, large, and to fetch.

class Chooser {
  constructor(server, live, bar) {
    Object.assign(this, { server, live, bar, run: "" });
  }

  async open(run) {
    const answer = await this.server.checkpoints({ run });
    Object.assign(this, { run, files: answer.files, shown: "", prompt: -1 });
    const last = answer.grid;
    const files = make("div", { class: "lw-row lw-checks" }, ...answer.files.map(({ name, step, epoch }, i) => make("label", {},
      make("input", { type: "checkbox", name, checked: last ? last.rows.includes(name) : i >= answer.files.length - MOST_CHOSEN, onchange: () => this.count() }),
      name, make("span", { class: "lw-facts" }, t`step ${step} · epoch ${epoch}`))));
    this.told = make("span", { class: "lw-facts" });
    this.at = make("input", { id: "lw-choose-at", class: "lw-input", value: last ? last.at.join(", ") : "0, 0.5, 0.75, 1", autocomplete: "off", oninput: () => this.count() });
    this.prompts = make("textarea", { id: "lw-choose-prompts", class: "lw-input", rows: 3, value: last ? last.lines : answer.prompts, spellcheck: false,
      placeholder: t`a cat on a roof, evening --d 1`, oninput: () => this.count() });
    this.start = make("button", { class: "lw-button lw-primary", type: "submit" });
    this.stop = make("button", { class: "lw-button", type: "button", hidden: true, onclick: () => this.bar.order(() => this.server.tool_stop({})) }, t`Stop`);
    this.phase = make("span", { class: "lw-facts", role: "status" });
    this.progress = make("progress", { "aria-label": t`Progress of the drawing`, hidden: true });
    this.wrong = make("p", { class: "lw-wrong", role: "alert" });
    this.notes = make("p", { class: "lw-note" });
    this.which = make("select", { class: "lw-input", "aria-label": t`Prompt shown`, onchange: () => { this.prompt = Number(this.which.value); this.show(true); } });
    this.grid = make("div", {});
    byId("lw-choose").replaceChildren(make("section", { class: "section", "aria-label": t`Choose a checkpoint` },
      make("div", { class: "lw-row lw-heading" }, make("h3", {}, t`Choose a checkpoint of ${run}`), make("span", { class: "lw-gap" }),
        make("button", { class: "lw-close", type: "button", "aria-label": t`Close`, onclick: () => this.close() }, "×")),
      make("form", { onsubmit: (event) => { event.preventDefault(); this.bar.order(() => this.draw()); } },
        make("fieldset", {}, make("legend", {}, t`Files`), files),
        make("div", { class: "lw-pairs" },
          make("label", { class: "lw-stack", htmlFor: "lw-choose-at" }, t`Strengths`, this.at, this.told),
          make("label", { class: "lw-stack", htmlFor: "lw-choose-prompts" }, t`Prompts, one a line`, this.prompts)),
        make("div", { class: "lw-row" }, this.start, this.stop, this.phase), this.progress, this.wrong, this.notes),
      this.grid));
    this.count();
    this.take(answer);
    byId("lw-choose").scrollIntoView({ block: "start", behavior: "smooth" });
  }

  close() {
    this.run = "";
    byId("lw-choose").replaceChildren();
  }

  get names() { return [...byId("lw-choose").querySelectorAll("[type=checkbox]:checked")].map((box) => box.name); }

  count() {
    const at = this.at.value.split(/[\s,]+/).filter(Boolean).map(Number), wrong = at.some(Number.isNaN);
    const files = this.names.length, strengths = new Set(at).size;
    const prompts = this.prompts.value.split("\n").filter((line) => line.trim() && !line.trim().startsWith("#")).length;
    const total = files * strengths * prompts;
    this.start.textContent = total ? t`Draw ${counted(total, "picture")}` : t`Draw`;
    this.start.title = t`${files} × ${strengths} × ${prompts}: files, strengths, prompts`;
    this.start.disabled = !total || wrong || this.running;
    this.told.className = wrong ? "lw-wrong" : "lw-facts";
    this.told.textContent = wrong ? t`Numbers, as in 0, 0.5, 1.` : t`1 is as trained, 0 the base model alone.`;
  }

  async draw() {
    const alive = ["starting", "running", "stopping"].includes(this.live.state);
    const text = make("p", {}, t`A training is going on. Drawing needs room for a second model in the same memory and slows both down.`);
    if (alive && (await ask(t`Draw while a training goes on?`, text, [["", t`Cancel`], ["yes", t`Draw now`, "lw-primary"]])) !== "yes") return;
    const { problems } = await this.server.grid_start({ run: this.run, names: this.names, at: this.at.value, prompts: this.prompts.value });
    this.wrong.textContent = problems.map((p) => sentence(`${p.label}: ${p.message}`)).join(" ");
    if (problems.length) return;
    this.left = scrollY;
    await this.poll();
  }

  // Ask until all is drawn, for as long as this run's grid is in view.
  async poll() {
    clearTimeout(this.timer);
    const { run } = this;
    let wait = 1000;
    try {
      const answer = await this.server.grid({ run });
      if (run !== this.run) return;
      this.take(answer);
      if (!this.running) return;
    } catch {
      this.phase.textContent = t`The server does not answer; trying again …`;
      wait = 3000;
    }
    this.timer = setTimeout(() => { if (run === this.run) this.poll(); }, wait);
  }

  take(answer) {
    const began = !this.running && answer.state === "running";
    Object.assign(this, { answer, running: answer.state === "running" });
    const { name, done, total } = answer.phase || {};
    this.stop.hidden = this.progress.hidden = !this.running;
    if (total) Object.assign(this.progress, { max: total, value: done });
    else this.progress.removeAttribute("value");
    this.phase.textContent = this.running ? (total ? t`${name || "starting"}: ${done} of ${total}` : t`${name || "starting"} …`) : "";
    this.wrong.textContent = ["failed", "stopped"].includes(answer.state) ? `${answer.failed.message} ${answer.failed.hint}` : "";
    this.notes.textContent = (answer.report?.report.warnings || []).join(" ");
    this.count();
    const before = this.shown;
    this.show();
    // What is drawn now comes into view, unless the reader has gone elsewhere.
    if (this.running && this.left === scrollY && this.shown !== before) this.start.scrollIntoView({ block: "start", behavior: "smooth" });
    if (!this.running || this.shown !== before) this.left = undefined;
    if (began) this.timer = setTimeout(() => this.poll(), 500);
  }

  show(anew = false) {
    const { grid, there } = this.answer, key = JSON.stringify([grid, there]);
    if (!grid) { if (this.shown) this.grid.replaceChildren(); this.shown = ""; return; }
    if (this.shown === key && !anew) return;
    this.shown = key;
    const drawn = new Set(there), several = grid.prompts.length > 1;
    if (this.prompt >= grid.prompts.length) this.prompt = -1;
    this.which.replaceChildren(make("option", { value: -1 }, t`all prompts`), ...grid.prompts.map(({ prompt }, i) => make("option", { value: i }, prompt)));
    this.which.value = String(this.prompt);
    const indices = grid.prompts.map((_, i) => i).filter((i) => this.prompt < 0 || this.prompt === i);
    const cell = (row, column) => make("td", {}, make("div", { class: "lw-shots" }, ...indices.map((i) => this.picture(row, column, i, drawn))));
    this.grid.replaceChildren(...(several ? [make("label", { class: "lw-row lw-which" }, t`Show`, this.which)] : []),
      make("div", { class: "lw-scroll", tabIndex: 0, role: "region", "aria-label": t`Pictures by file and strength` }, make("table", { class: "lw-table lw-contact" },
        make("thead", {}, make("tr", {}, make("th", { scope: "col" }, t`File`), ...grid.at.map((at) => make("th", { scope: "col" }, at === 0 ? t`0 · base model` : t`strength ${at}`)))),
        make("tbody", {}, ...grid.rows.map((name, row) => make("tr", {}, make("th", { scope: "row" }, this.named(name)), ...grid.at.map((_, column) => cell(row, column))))))));
  }

  // A long name may break behind its hyphens.
  named(name) {
    const file = this.files.find((one) => one.name === name);
    const parts = name.replace(/\.safetensors$/, "").match(/[^-]+-*|-+/g) || [];
    return make("span", {}, ...parts.flatMap((part) => [part, make("wbr")]), file && make("span", { class: "lw-facts" }, ` ${t`step ${file.step}`}`));
  }

  address(row, column, i) { return fileAddress(`${this.answer.folder}/${this.answer.grid.pictures[row][column][i]}`); }

  about(row, column, i) {
    const { grid } = this.answer;
    return t`${grid.prompts[i].prompt}, ${grid.rows[row]} at strength ${grid.at[column]}`;
  }

  picture(row, column, i, drawn) {
    const { grid } = this.answer, [width, height] = grid.prompts[i].size;
    if (!drawn.has(grid.pictures[row][column][i])) return make("span", { class: "lw-none", style: `aspect-ratio: ${width} / ${height}` }, this.running ? "…" : "–");
    const about = this.about(row, column, i);
    return make("button", { class: "lw-picture", type: "button", "aria-label": t`${about}, open large`, onclick: () => this.large(row, column, i) },
      make("img", { src: this.address(row, column, i), alt: about, loading: "lazy", style: `aspect-ratio: ${width} / ${height}` }));
  }

  // Large: arrows go through strengths (left, right) and files (up, down).
  large(row, column, i) {
    const { grid } = this.answer, path = make("code", {}), tag = make("code", {});
    const fetch = make("button", { class: "lw-button lw-primary", type: "button", onclick: () => this.live.download(grid.rows[row], this.run) });
    const told = () => {
      const name = grid.rows[row], { prompt, seed } = grid.prompts[i];
      fetch.textContent = t`Use this one: ↓ ${name}`;
      path.textContent = this.files.find((file) => file.name === name)?.path || name;
      tag.textContent = `<lora:${name.replace(/\.safetensors$/, "")}:${grid.at[column]}>`;
      return [this.address(row, column, i), this.about(row, column, i), t`${name} at strength ${grid.at[column]} · seed ${seed} · ${prompt}`];
    };
    enlarged(t`Picture`, told(), (right, down) => {
      if (!this.answer.there.includes(grid.pictures[row + down]?.[column + right]?.[i])) return null;
      [row, column] = [row + down, column + right];
      return told();
    }, make("div", { class: "lw-use" }, fetch, make("span", {}, t`It lies in `, path), make("span", {}, t`In a web UI's prompt: `, tag)));
  }
}

const MOST_CHOSEN = 6;
