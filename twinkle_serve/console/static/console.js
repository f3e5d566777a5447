// Parts of a page marked data-live are fetched anew while somebody looks. Knows no page.
const EVERY_MS = 3000;

async function refresh(part, index) {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.redirected) {
    location.reload();
    return;
  }
  if (!answer.ok || part.contains(document.activeElement)) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.querySelectorAll("[data-live]")[index];
  if (fresh && fresh.innerHTML !== part.innerHTML) part.replaceChildren(...fresh.childNodes);
}

const live = [...document.querySelectorAll("[data-live]")];
if (live.length) {
  setInterval(() => {
    if (document.hidden) return;
    live.forEach((part, index) => refresh(part, index).catch(() => {}));
  }, EVERY_MS);
}
