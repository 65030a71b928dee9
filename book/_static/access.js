// What the theme leaves out for those who listen to a page or have no mouse.
window.addEventListener("DOMContentLoaded", () => {
  // A button is called by the words on it, or by its label, not by both.
  document.querySelectorAll(".search-button-field").forEach((button) => button.removeAttribute("aria-label"));
  document.querySelectorAll(".theme-switch").forEach((icon) => {
    icon.removeAttribute("title");
    icon.querySelector("title")?.remove(); // it may be a drawing already,
    icon.setAttribute("aria-hidden", "true"); // and the button has a name
  });
  // The arrow beside a page of the contents says whose pages it folds.
  for (const summary of document.querySelectorAll(".bd-sidebar-primary .has-children > details > summary")) {
    const page = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `Pages below ${page.textContent.trim()}`);
  }
  // Code that scrolls can be scrolled by keyboard, also where it was folded when the page opened.
  const reach = () => {
    for (const box of document.querySelectorAll(".bd-article pre, .bd-article .text_html")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  };
  for (const folded of document.querySelectorAll("details")) folded.addEventListener("toggle", reach);
  window.addEventListener("resize", reach);
});
