// Runs before anything is drawn, so that no page flashes in the other theme.
{
  const place = "manyheads" + new URL(".", location.href).pathname;
  const settings = JSON.parse(localStorage.getItem(place + "settings") ?? "{}");
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
}
