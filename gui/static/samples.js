// The samples: a slider over steps, a column a prompt, the untrained picture beside the current one.

class Samples {
  constructor() {
    this.slider = byId("lw-sample-step");
    this.grid = byId("lw-samples");
    this.slider.addEventListener("input", () => this.show());
    this.clear();
  }

  clear() {
    this.pictures = new Map(); // step → prompt's index → sample
    this.without = new Map(); // prompt's index → the picture without the LoRA, where one was drawn
    this.prompts = new Map();
    this.grid.replaceChildren();
    this.show();
  }

  steps() { return [...this.pictures.keys()].sort((a, b) => a - b); }

  add(samples) {
    if (!samples.length) return false;
    const atEnd = Number(this.slider.value) >= this.steps().length - 1;
    for (const sample of samples) {
      if (sample.strength === 0) { this.without.set(sample.index, sample); continue; }
      if (!this.pictures.has(sample.step)) this.pictures.set(sample.step, new Map());
      this.pictures.get(sample.step).set(sample.index, sample);
      this.prompts.set(sample.index, sample.prompt);
    }
    this.slider.max = String(this.steps().length - 1);
    if (atEnd) this.slider.value = this.slider.max;
    this.show();
    return true;
  }

  show() {
    const steps = this.steps();
    byId("lw-samples-box").hidden = !steps.length;
    if (!steps.length) return;
    const at = steps[Math.min(Number(this.slider.value), steps.length - 1)];
    this.slider.disabled = steps.length < 2;
    this.slider.setAttribute("aria-valuetext", t`step ${at}`);
    byId("lw-sample-at").textContent = at === 0 ? t`before training` : t`step ${at}`;
    const first = steps[0];
    this.grid.replaceChildren(...[...this.prompts.keys()].sort((a, b) => a - b).map((index) => {
      const without = this.without.get(index);
      const before = without || (first === 0 && at !== 0 ? this.pictures.get(0).get(index) : null);
      const now = this.pictures.get(at).get(index);
      return make("figure", { class: "lw-sample" },
        make("div", { class: "lw-pair" }, before ? this.picture(before, without ? t`without LoRA` : "before") : null,
          now ? this.picture(now, at === 0 ? "before" : t`step ${at}`) : make("div", { class: "lw-none" }, t`not drawn at this step`)),
        make("figcaption", { title: this.prompts.get(index) }, this.prompts.get(index)));
    }));
  }

  picture(sample, tag) {
    return make("button", { class: "lw-picture", type: "button", onclick: () => this.large(sample), "aria-label": t`${sample.prompt}, ${tag}, open large` },
      make("img", { src: sample.address || fileAddress(sample.path), alt: `${sample.prompt}, ${tag}`, loading: "lazy" }),
      make("span", {}, tag));
  }

  // Large: arrows go through steps (left, right) and prompts (up, down).
  large(sample) {
    const image = make("img", {}), text = make("figcaption", {});
    const dialog = make("dialog", { class: "lw-dialog lw-large", "aria-label": t`Sample` }, make("figure", {}, image, text),
      make("button", { class: "lw-close", type: "button", "aria-label": t`Close`, onclick: () => dialog.close() }, "×"));
    let { step, index } = sample;
    const show = (found) => {
      if (!found) return;
      const when = found.strength === 0 ? t`without the LoRA` : step === 0 ? t`before training` : t`step ${step}`;
      image.src = found.address || fileAddress(found.path);
      image.alt = `${found.prompt}, ${when}`;
      text.textContent = t`${when} · seed ${found.seed} · ${found.prompt}`;
    };
    dialog.addEventListener("keydown", (event) => {
      const steps = this.steps(), prompts = [...this.prompts.keys()].sort((a, b) => a - b);
      const move = (list, value, by) => list[Math.min(list.length - 1, Math.max(0, list.indexOf(value) + by))];
      if (event.key === "ArrowRight") step = move(steps, step, 1);
      else if (event.key === "ArrowLeft") step = move(steps, step, -1);
      else if (event.key === "ArrowDown") index = move(prompts, index, 1);
      else if (event.key === "ArrowUp") index = move(prompts, index, -1);
      else return;
      event.preventDefault();
      show(this.pictures.get(step)?.get(index));
    });
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    show(sample);
    dialog.showModal();
  }
}
