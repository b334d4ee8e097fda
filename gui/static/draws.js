// What the trainer sees: reads of images as the training's own loader draws them.

class DrawsPart {
  constructor(form, server) {
    Object.assign(this, { form, server, following: 0 });
    form.whenChanged.push(() => this.of && JSON.stringify(form.entries) !== this.of && this.outdate(t`The form has changed since these were drawn. Draw again to see what it makes of the images now.`));
    document.addEventListener("lw-captions", () => this.outdate(t`Captions have changed since these were drawn. Draw again to see what becomes of them now.`));
    document.addEventListener("click", (event) => {
      if (event.target.id === "lw-draws-first") this.draw(0);
      if (event.target.id === "lw-draws-next") this.draw(this.following);
    });
  }

  // It takes seconds, and keeps nobody from anything else.
  async draw(batch) {
    if (this.drawing) return;
    this.drawing = true;
    await this.drawn(batch);
    this.drawing = false;
  }

  async drawn(batch) {
    const told = byId("lw-draws-told"), list = byId("lw-draws"), entries = this.form.entries;
    told.className = "lw-facts";
    told.textContent = t`Drawing …`;
    let answer;
    try {
      answer = await this.server.draws({ entries, batch });
    } catch (error) {
      told.textContent = error.message;
      return;
    }
    if (answer.problems.length) {
      told.className = "lw-wrong";
      told.textContent = answer.problems.map((p) => sentence(`${p.label}: ${p.message}`)).join(" ");
      list.replaceChildren();
      return;
    }
    this.of = JSON.stringify(entries);
    list.classList.remove("lw-outdated");
    this.following = answer.following;
    byId("lw-draws-next").hidden = false;
    told.textContent = answer.chosen ? t`Drawn with the seed ${answer.seed}, as a training with these settings does.`
      : t`Seed is empty, so every training draws anew. These are of a random one, ${answer.seed}.`;
    list.replaceChildren(...answer.draws.map((draw) => this.card(draw)));
  }

  // What was drawn is no longer what a training would see.
  outdate(reason) {
    const list = byId("lw-draws");
    if (!list?.children.length || list.classList.contains("lw-outdated")) return;
    list.classList.add("lw-outdated");
    byId("lw-draws-told").textContent = reason;
  }

  card(draw) {
    const words = draw.tokens.map((token, i) => make("span", { class: i < draw.kept ? "lw-token" : "lw-token lw-token-cut" }, token));
    const cut = draw.tokens.length - draw.kept;
    const facts = [t`step ${draw.step}`, `${draw.bucket[0]}×${draw.bucket[1]}`, draw.flipped && t`mirrored`, counted(draw.kept, "token"),
      draw.weight !== 1 && t`loss × ${draw.weight}`, draw.name];
    return make("figure", { class: "lw-card" }, make("img", { class: "lw-drawn", src: draw.picture, alt: draw.name }),
      make("figcaption", {},
        make("p", { class: "lw-tokens" }, ...(words.length ? words : [make("em", {}, draw.before ? t`without its caption (dropped)` : t`without a caption`)])),
        cut > 0 && make("p", { class: "lw-cut" }, t`${counted(cut, "token")} cut`),
        make("p", { class: "lw-facts" }, facts.filter(Boolean).join(" · "))));
  }
}
