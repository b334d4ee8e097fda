// A zip with images from this machine to the one that trains, in pieces, each asked for again where the line breaks.

const PIECE = 512 * 1024, TRIES = 5;

class UploadPart {
  constructor(form, server, bar) {
    Object.assign(this, { form, server, bar });
    document.addEventListener("change", (event) => { if (event.target.id === "lw-upload-file") this.offer(event.target.files[0]); });
    document.addEventListener("submit", (event) => { if (event.target.id === "lw-upload") { event.preventDefault(); this.send(); } });
    document.addEventListener("click", (event) => {
      if (event.target.id === "lw-upload-cancel") this.cancel();
      if (event.target.id === "lw-upload-use") this.use();
    });
  }

  tell(text, wrong = false) {
    byId("lw-upload-told").textContent = text;
    byId("lw-upload-told").classList.toggle("lw-wrong", wrong);
  }

  busy(sending) {
    byId("lw-upload-send").disabled = byId("lw-upload-target").disabled = byId("lw-upload-file").disabled = sending;
    byId("lw-upload-progress").hidden = !sending;
  }

  // What is offered: to upload, or to use what was.
  offers(uploaded) {
    byId("lw-upload-use").hidden = !uploaded;
    byId("lw-upload-send").hidden = uploaded;
    byId("lw-upload-target").readOnly = uploaded;
    byId("lw-upload-cancel").textContent = uploaded ? t`Close` : t`Cancel`;
  }

  async offer(file) {
    if (!file) return;
    this.file = file;
    byId("lw-upload").hidden = false;
    this.offers(false);
    this.tell(`${file.name}, ${bytes(file.size)}`);
    try {
      const { folder, most } = await this.server.upload({ step: "place", name: file.name });
      byId("lw-upload-target").value = folder;
      if (file.size > most) this.tell(t`The zip has ${bytes(file.size)}; ${bytes(most)} are the most. Send the folders one by one.`, true);
    } catch (error) {
      this.tell(error.message, true);
    }
    byId("lw-upload-target").focus();
  }

  // One step on the server; what it refuses is thrown.
  async step(order) {
    const answer = await this.server.upload(order);
    if (answer.refused) throw Object.assign(new Error(answer.refused), { final: true });
    return answer;
  }

  async send() {
    if (this.sending || !this.file) return;
    this.sending = true;
    this.busy(true);
    const file = this.file, target = byId("lw-upload-target").value;
    try {
      const { id } = await this.step({ step: "begin", size: file.size, target });
      this.id = id;
      for (let offset = 0; offset < file.size;) {
        if (!this.sending) return;
        ({ offset } = await this.piece(file, id, offset));
        byId("lw-upload-progress").value = offset / file.size;
        this.tell(t`${bytes(offset)} of ${bytes(file.size)}`);
      }
      byId("lw-upload-progress").removeAttribute("value");
      this.tell(t`Unpacking …`);
      const found = await this.unpacked(id, target);
      if (!found) return;
      this.folder = found.folder;
      this.tell([t`${counted(found.images, "image")} and ${counted(found.captions, "caption file")} are in ${found.folder}.`,
        found.left_out ? t`Left out, being neither: ${found.examples.join(", ")}${found.left_out > found.examples.length ? " …" : ""}` : ""].filter(Boolean).join(" "));
      this.offers(true);
      byId("lw-upload-use").focus();
    } catch (error) {
      this.tell(error.message, true);
      if (this.id) this.server.upload({ step: "drop", id: this.id }).catch(() => {});  // what is left goes after some hours anyway
    } finally {
      this.sending = false;
      this.id = "";
      this.busy(false);
      byId("lw-upload-file").value = "";
    }
  }

  async piece(file, id, offset) {
    const address = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(Object.assign(new Error(t`${file.name} can no longer be read.`), { final: true }));
      reader.readAsDataURL(file.slice(offset, offset + PIECE));
    });
    return this.persist({ step: "add", id, offset, data: address.slice(address.indexOf(",") + 1) });
  }

  // Asked again until the last file is there; nothing when it was given up.
  async unpacked(id, target) {
    while (this.sending) {
      const found = await this.persist({ step: "unpack", id, target });
      if (found.folder) return found;
      if (!this.sending) break;
      byId("lw-upload-progress").value = found.done / (found.total || 1);
      this.tell(t`Unpacked ${found.done} of ${counted(found.total, "file")} …`);
    }
  }

  // One step on the server, tried again where the line breaks.
  async persist(order) {
    for (let tried = 1; ; tried += 1) {
      try {
        return await this.step(order);
      } catch (error) {
        if (error.final || tried === TRIES) throw error;
        this.tell(t`${error.message} Trying again …`);
        await new Promise((resolve) => { setTimeout(resolve, 1000 * tried); });
      }
    }
  }

  cancel() {
    if (this.sending) this.server.upload({ step: "drop", id: this.id || "" }).catch(() => {});
    this.sending = false;
    byId("lw-upload").hidden = true;
    byId("lw-upload-file").value = "";
  }

  async use() {
    byId("lw-upload").hidden = true;
    await this.form.type("train_data_dir", this.folder);
  }
}
