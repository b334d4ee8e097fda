// Put the page together, once all of its parts are there.

async function begin(server) {
  await whenThere(() => byId("form") && byId("lw-read") && byId("lw-fill") && byId("lw-log"), 20000);
  document.head.append(make("style", {}, LATER_STYLES));
  const hello = await server.hello({});
  const form = new Form(hello.table, server);
  form.models = hello.models;
  document.body.append(make("datalist", { id: "lw-models" }, ...hello.models.map((value) => make("option", { value }))));
  form.attach();
  // What sticks below the bar must know how tall the bar is with its banner.
  new ResizeObserver(([bar]) => document.documentElement.style.setProperty("--lw-bar", `${bar.target.offsetHeight}px`)).observe(byId("bar"));
  new ResizeObserver(([head]) => document.documentElement.style.setProperty("--lw-head", `${head.target.offsetHeight}px`)).observe(byId("lw-bar"));
  const banner = new Banner(byId("lw-banner"), form);
  const live = new Live(server, form);
  const bar = new Bar(form, banner, server, live);
  new Outlook(form, server);
  new DatasetTab(form, server, bar);
  new DrawsPart(form, server);
  new UploadPart(form, server, bar);
  new RunList(server, live, bar);
  new Json(server, form, bar);
  new Finder(form, server, new Tools(server, form, bar));
  bar.offer(hello);
  await form.fill(hello.draft.entries, hello.draft.kept);
  await returnToTab();
  document.documentElement.dataset.lorawright = "ready";
}

// A reload finds the reader where they were.
async function returnToTab() {
  const gone_from = sessionStorage.getItem("lw-tab");
  if (["tab-basic-button", "tab-advanced-button"].includes(gone_from)) byId("tab-parameters-button").click();
  if (gone_from) (await whenThere(() => byId(gone_from))).click();
  document.addEventListener("click", ({ target }) => {
    const tab = target.closest("#form [role=tab][id^=tab-]");
    if (tab) sessionStorage.setItem("lw-tab", tab.id);
  });
}
