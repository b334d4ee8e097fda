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
      // A training's last step draws one prompt alone: of the others the newest until then.
      const now = steps.filter((step) => step <= at && (step || !at)).map((step) => this.pictures.get(step).get(index)).filter(Boolean).at(-1);
      return make("figure", { class: "lw-sample" },
        make("div", { class: "lw-pair" }, before ? this.picture(before, without ? t`no LoRA` : t`before`) : null,
          now ? this.picture(now, now.step === 0 ? t`before` : t`step ${now.step}`) : make("div", { class: "lw-none" }, t`not drawn yet`)),
        make("figcaption", { title: this.prompts.get(index) }, this.prompts.get(index)));
    }));
  }

  picture(sample, tag) {
    return make("button", { class: "lw-picture", type: "button", onclick: () => this.large(sample), "aria-label": t`${sample.prompt}, ${tag}, open large` },
      make("img", { src: sample.address || fileAddress(sample.path), alt: `${sample.prompt}, ${tag}`, loading: "lazy" }),
      make("span", { title: tag }, tag));
  }

  // Large: arrows go through steps (left, right) and prompts (up, down).
  large(sample) {
    let { step, index } = sample;
    const told = (found) => {
      if (!found) return null;
      const when = found.strength === 0 ? t`without the LoRA` : step === 0 ? t`before training` : t`step ${step}`;
      return [found.address || fileAddress(found.path), `${found.prompt}, ${when}`, t`${when} · seed ${found.seed} · ${found.prompt}`];
    };
    enlarged(t`Sample`, told(sample), (right, down) => {
      const steps = this.steps(), prompts = [...this.prompts.keys()].sort((a, b) => a - b);
      const move = (list, value, by) => list[Math.min(list.length - 1, Math.max(0, list.indexOf(value) + by))];
      [step, index] = [move(steps, step, right), move(prompts, index, down)];
      return told(this.pictures.get(step)?.get(index));
    });
  }
}
