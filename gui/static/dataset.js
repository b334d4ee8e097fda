// The images as the trainer takes them: how many steps they make, their buckets, crops and captions.

class DatasetTab {
  constructor(form, server, bar) {
    Object.assign(this, { form, server, bar, banner: bar.banner, thumbnails: new Map(), wanted: new Set() });
    form.whenChanged.push(() => this.later());
    setInterval(() => { if (byId("lw-dataset")?.offsetParent && (this.shown !== this.form.entries || this.seeking() || (this.stale && !this.typing()))) this.later(); }, 400);
    addEventListener("pagehide", () => this.writeAtOnce());
  }

  // What is looked for: its words, and the tag.
  get sought() { return { find: byId("lw-dataset-find").value, tag: this.tag || "" }; }

  // Whether images that are not listed have still to be looked through for it.
  seeking() { return this.partly && JSON.stringify(this.sought) !== this.found; }

  typing() { return document.activeElement?.classList.contains("lw-caption"); }

  attach() {
    byId("lw-dataset").dataset.ready = "1";
    byId("lw-dataset-pick").addEventListener("click", () => browse(this.form, this.form.parameters.get("train_data_dir"), this.server));
    byId("lw-dataset-find").addEventListener("input", () => this.filter());
    byId("lw-inspect").addEventListener("click", () => this.bar.order(() => this.inspect()));
    byId("lw-captions-how").addEventListener("change", () => this.fit());
    byId("lw-captions").addEventListener("submit", (event) => { event.preventDefault(); this.bar.order(() => this.changeAll()); });
    byId("lw-captions-undo").addEventListener("click", () => this.bar.order(() => this.undo()));
    this.seen = new IntersectionObserver((entries) => {
      // What was scrolled past before its turn came waits until it is seen again.
      for (const entry of entries) this.wanted[entry.isIntersecting ? "add" : "delete"](entry.target);
      this.fetch();
    }, { rootMargin: "300px" });
  }

  later() {
    if (this.timer || !byId("lw-dataset")?.offsetParent) return;
    if (!byId("lw-dataset").dataset.ready) this.attach();
    this.timer = setTimeout(() => this.ask(), 500);
  }

  async ask() {
    const entries = this.form.entries, sought = this.sought;
    this.again = false;
    try {
      const answer = await this.server.dataset({ entries, ...sought });
      this.shown = entries;
      this.found = JSON.stringify(sought);
      // Most changes to the form leave the images as they are.
      const key = JSON.stringify(answer);
      // Who is typing a caption is not interrupted; the next look shows what changed.
      this.stale = key !== this.key && this.typing();
      if (!this.stale) {
        if (key !== this.key) this.show(answer, entries);
        else this.filter();
        this.key = key;
      }
    } catch (error) {
      byId("lw-dataset-sum").textContent = t`${error.message} Trying again …`;
      await new Promise((resolve) => { setTimeout(resolve, 3000); });
    } finally {
      this.timer = undefined;
      if (this.again) this.later();
    }
  }

  show(found, entries) {
    byId("lw-dataset-place").textContent = entries.train_data_dir;
    const { steps, folders, images, total, buckets, tags } = found;
    byId("lw-dataset-sum").replaceChildren(...(folders.length ? [
      folders.map((f) => `${f.regularisation ? t`${f.seen} from ${f.images}` : `${f.images} × ${f.repeats}`} (${f.name}${f.regularisation ? t`, regularisation` : ""}${f.unreadable ? t`, ${f.unreadable} unreadable` : ""})`).join(" + "),
      steps ? make("b", {}, t` = ${counted(steps.seen, "image")} an epoch`) : "",
      steps ? t` in ${counted(steps.batches, "batch", "batches")} of ${steps.batch}` : "",
      steps && !steps.limited ? t` × ${counted(steps.epochs, "epoch")}${steps.accumulation > 1 ? t` ÷ ${steps.accumulation} a step` : ""}` : "",
      steps ? (steps.limited ? t`; Max train steps makes it ` : " = ") : "",
      steps ? make("b", {}, counted(steps.steps, "step")) : "",
    ] : [t`No images yet: choose a folder that holds folders like “10_cat” (each image ten times an epoch), or images.`]));
    const locked = total && found.locked ? [{ severity: "note", message: t`These captions cannot be edited here: ${found.locked}` }] : [];
    byId("lw-dataset-problems").replaceChildren(...[...found.problems, ...locked].map((p) => this.banner.line(p)));
    byId("lw-captions").hidden = locked.length > 0;
    this.locked = found.locked;
    const looked = JSON.stringify([entries.train_data_dir, entries.reg_data_dir, folders]);
    if (looked !== this.looked) byId("lw-inspected").replaceChildren();
    this.looked = looked;
    byId("lw-dataset-parts").hidden = !total;
    const most = Math.max(...buckets.map(([, , , seen]) => seen), 1);
    byId("lw-buckets").replaceChildren(...buckets.map(([wide, high, count, seen]) => make("div", { class: "lw-bucket" },
      make("span", {}, wide ? `${wide}×${high}` : t`none`), make("span", { class: "lw-bar", style: `width:${(60 * seen) / most}%` }),
      make("span", { class: "lw-facts" }, t`${counted(count, "image")}, ${seen} seen`))));
    this.tag = tags.some(([tag]) => tag === this.tag) ? this.tag : "";
    byId("lw-tags").replaceChildren(...tags.map(([tag, count]) => make("button", { class: "lw-chip", type: "button", "data-tag": tag,
      "aria-pressed": String(tag === this.tag), onclick: () => this.choose(tag) }, tag, " ", make("span", {}, String(count)))),
      tags.length ? "" : make("span", { class: "lw-facts" }, t`No captions.`));
    byId("lw-captions-undo").hidden = !found.undo;
    byId("lw-captions-undo").textContent = t`Undo: ${found.undo}`;
    this.seen.disconnect();
    this.wanted.clear();
    Object.assign(this, { total, more: found.more, partly: total > images.length });
    this.cards = new Map(images.map((image) => [image.path, this.kept(image) || this.card(image)]));
    byId("lw-images").replaceChildren(...this.cards.values());
    this.filter();
  }

  // The card of an image that is as it was: most are, when a caption changes.
  kept(image) {
    const card = this.cards?.get(image.path);
    if (!card || JSON.stringify(card.image) !== JSON.stringify(image)) return null;
    card.querySelector("textarea").value = image.caption || "";
    if (!card.querySelector("img")) this.seen.observe(card);
    return card;
  }

  card(image) {
    const [left, top, wide, high] = image.crop || [0, 0, 1, 1];
    const frame = make("div", { class: "lw-thumb", style: `aspect-ratio:${image.size[0]}/${image.size[1]}` },
      make("div", { class: "lw-crop", style: `left:${100 * left}%;top:${100 * top}%;width:${100 * wide}%;height:${100 * high}%` }));
    const cut = image.crop ? `${image.size[0]}×${image.size[1]} → ${image.bucket[0]}×${image.bucket[1]}` : t`${image.size[0]}×${image.size[1]}, fits no bucket`;
    const card = make("figure", { class: "lw-card" }, frame, make("figcaption", {},
      make("textarea", { class: `lw-caption ${image.captioned ? "" : "lw-borrowed"}`, rows: 3, value: image.caption || "", placeholder: t`no caption`,
        readOnly: Boolean(this.locked), title: this.locked || image.captioned ? this.locked || "" : t`From the folder's name: there is no caption file`, "aria-label": t`Caption of ${image.folder}/${image.name}`,
        onkeydown: (event) => { if (event.key === "Enter") { event.preventDefault(); event.target.blur(); } },
        onchange: (event) => this.write(image, event.target) }),
      image.cut && make("p", { class: "lw-cut", title: image.cut }, t`${image.tokens} tokens, cut: ${image.cut}`),
      make("p", { class: "lw-facts" }, `${image.folder}/${image.name} · ${cut}`)));
    Object.assign(card, { image, frame });
    const known = this.thumbnails.get(image.path);
    if (known) this.put(card, known);
    else this.seen.observe(card);
    return card;
  }

  put(card, address) {
    this.seen.unobserve(card);
    card.frame.prepend(make("img", { src: address, alt: card.image.name }));
  }

  // Pictures of the cards that came into view, some at a time.
  async fetch() {
    if (this.fetching) return;
    this.fetching = true;
    try {
      while (this.wanted.size) {
        const cards = [...this.wanted].slice(0, 24);
        const { pictures } = await this.server.thumbnails({ entries: this.shown, paths: cards.map((card) => card.image.path) });
        for (const card of cards) {
          this.wanted.delete(card);
          const address = pictures[card.image.path];
          if (!address) { card.frame.classList.add("lw-unreadable"); this.seen.unobserve(card); continue; }
          this.thumbnails.set(card.image.path, address);
          this.put(card, address);
        }
      }
    } catch (error) {
      byId("lw-dataset-count").textContent = t`${error.message} Scroll to try again.`;
    } finally {
      this.fetching = false;
    }
  }

  // Look at every image, some at a time.
  async inspect() {
    const list = byId("lw-inspected"), entries = this.form.entries;
    let answer;
    do {
      answer = await this.server.inspect({ entries });
      list.replaceChildren(make("li", {}, t`Looked at ${answer.done} of ${counted(answer.total, "image")} …`));
    } while (answer.done < answer.total);
    list.replaceChildren(...(answer.problems.length ? answer.problems.map((p) => this.banner.line(p)) : [make("li", {}, answer.total ? t`${counted(answer.total, "image")}: nothing wrong was seen.` : t`There are no images to look at.`)]));
  }

  fit() {
    const how = byId("lw-captions-how").value, taken = ["name", "folder"].includes(how);
    byId("lw-captions-text").hidden = taken;
    byId("lw-captions-all").hidden = !taken;
    byId("lw-captions-by").hidden = how !== "replace";
    byId("lw-captions-end").hidden = how !== "add";
    byId("lw-captions-text").placeholder = ["add", "remove"].includes(how) ? t`tag` : t`text`;
  }

  // Keep what was typed below one picture; the card stays where it is.
  async write(image, box) {
    let refused;
    try {
      ({ refused } = await this.server.captions({ how: "write", entries: this.shown, path: image.path, text: box.value, sure: true }));
    } catch (error) {
      refused = error.message;
    }
    if (refused) this.banner.show("error", t`The caption was not kept. What you typed stands below the picture still.`, [{ severity: "error", message: refused }]);
    else if (this.unkept) this.banner.clear();
    this.unkept = Boolean(refused);
    if (refused) return;
    image.caption = box.value;
    box.classList.toggle("lw-borrowed", !box.value);
    box.title = "";
    this.changed();
  }

  // A page that is left does not wait until the caption is.
  writeAtOnce() {
    const box = this.typing() && document.activeElement, image = box && box.closest(".lw-card").image;
    if (image && box.value !== (image.caption || "")) this.bar.askAtOnce("captions", { how: "write", entries: this.shown, path: image.path, text: box.value, sure: true });
  }

  async changeAll() {
    const how = byId("lw-captions-how").value, text = byId("lw-captions-text").value;
    const order = { how, entries: this.shown, text, find: text, by: byId("lw-captions-by").value, end: byId("lw-captions-end").firstElementChild.checked, all: Boolean(byId("lw-captions-all").value) };
    let answer = await this.server.captions(order);
    if (answer.count) {
      const more = answer.count - answer.examples.length;
      const list = make("div", { class: "lw-stack lw-names" }, ...answer.examples.map(([name, before, after]) => make("p", {}, make("b", {}, name), ` ${before || t`(none)`} → ${after || t`(none)`}`)),
        more > 0 && make("p", {}, t`and ${more} more`),
        make("p", { class: "lw-facts" }, t`Regularisation images are left alone. A backup is made first, in ${answer.backups}.`));
      if ((await ask(t`Change ${counted(answer.count, "caption")}?`, list, [["", t`Leave them`], ["change", t`Change`, "lw-primary"]])) !== "change") return;
      answer = await this.server.captions({ ...order, sure: true });
    }
    if (answer.refused) this.banner.show("error", t`No caption was changed.`, [{ severity: "error", message: answer.refused }]);
    else this.banner.show("good", answer.count ? t`${counted(answer.count, "caption")} changed.` : t`There is no caption to change so.`);
    this.changed();
  }

  async undo() {
    const { refused, count, left } = await this.server.captions({ how: "undo" });
    if (refused) this.banner.show("error", t`Nothing was taken back.`, [{ severity: "error", message: refused }]);
    else this.banner.show(left.length ? "warning" : "good", t`${counted(count, "caption")} as before.`,
      left.length ? [{ severity: "warning", message: t`Changed since by someone else, and left alone: ${left.join(", ")}` }] : []);
    this.changed();
  }

  // Captions changed, perhaps while it was being asked for them.
  changed() {
    document.dispatchEvent(new Event("lw-captions"));
    this.again = true;
    this.later();
  }

  choose(tag) {
    this.tag = this.tag === tag ? "" : tag;
    for (const chip of byId("lw-tags").children) chip.setAttribute("aria-pressed", String(chip.dataset.tag === this.tag));
    this.filter();
  }

  filter() {
    const words = byId("lw-dataset-find").value.trim().toLowerCase();
    const cards = [...byId("lw-images").children];
    for (const card of cards) {
      const caption = card.image.caption || "";
      card.hidden = !`${caption} ${card.image.name}`.toLowerCase().includes(words)
        || Boolean(this.tag && !caption.split(",").some((tag) => tag.trim() === this.tag));
    }
    if (this.seeking()) {
      this.later();
      byId("lw-dataset-count").textContent = t`Looking through ${counted(this.total, "image")} …`;
      return;
    }
    const left = cards.filter((card) => !card.hidden).length;
    byId("lw-dataset-count").textContent = [left < this.total ? t`${left} of ${counted(this.total, "image")}` : counted(left, "image"),
      this.more ? t`${this.more} more are not listed: search more closely` : "", t`the frame is what is trained on`].filter(Boolean).join(" · ");
  }
}
