// The folder browser: a listing from the server, inside the folders that it may show.

async function browse(form, parameter, server) {
  const files = parameter.kind !== "folder";
  const list = make("ul", { class: "lw-files", role: "listbox", "aria-label": t`Folders and files` });
  const place = make("input", { class: "lw-input", "aria-label": t`Folder`, spellcheck: false });
  const note = make("p", { class: "lw-facts", "aria-live": "polite" });
  const choose = make("button", { class: "lw-button lw-primary", type: "button" }, t`Use this folder`);
  const dialog = make("dialog", { class: "lw-dialog lw-browser", "aria-label": t`Browse for ${parameter.label}` },
    make("h2", {}, parameter.label), place, list, note,
    make("div", { class: "lw-dialog-buttons" },
      make("button", { class: "lw-button", type: "button", onclick: () => dialog.close() }, t`Cancel`),
      choose));
  let here = "";

  const take = (path) => { form.type(parameter.key, path); dialog.close(); };
  const row = (icon, name, act) => make("li", {}, make("button", { type: "button", role: "option", "aria-selected": "false", onclick: act },
    make("span", { "aria-hidden": "true", class: `lw-icon lw-icon-${icon}` }), name));

  async function go(path) {
    let found;
    try {
      found = await server.listing({ path, files });
    } catch (error) {
      note.textContent = error.message;
      return;
    }
    here = found.path;
    place.value = here;
    choose.disabled = !here || parameter.kind === "file";
    const up = found.parent === null ? [] : [row("up", "..", () => go(found.parent))];
    list.replaceChildren(...up, ...found.entries.map((entry) =>
      row(entry.what, entry.name, () => (entry.what === "folder" ? go(entry.path) : take(entry.path)))));
    const facts = [found.refused];
    if (here && !found.entries.length && !found.refused) facts.push(t`Nothing inside that could be picked.`);
    if (found.images) facts.push(t`${counted(found.images, "image")} in this folder.`);
    if (found.more) facts.push(t`${found.more} more are not shown; type the path.`);
    note.textContent = facts.filter(Boolean).join(" ");
    list.scrollTop = 0;
  }

  choose.addEventListener("click", () => take(here));
  place.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); go(place.value); } });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const buttons = [...list.querySelectorAll("button")];
    buttons[Math.min(buttons.length - 1, Math.max(0, buttons.indexOf(document.activeElement) + step))]?.focus();
  });
  dialog.addEventListener("close", () => { dialog.remove(); form.input(parameter.key)?.focus(); });
  document.body.append(dialog);
  dialog.showModal();
  const entry = form.entries[parameter.key];
  await go(entry.startsWith("embedded:") ? "" : entry); // what comes along is in no folder to look into
  list.querySelector("button")?.focus();
}
