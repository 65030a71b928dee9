// What the widgets' bundle expects of a page and the theme does not give it, and what it leaves out.

// It changes the class of its icons: the theme's Font Awesome must not replace them by drawings,
// as it does with what appears after the page has loaded.
window.FontAwesomeConfig = { observeMutations: false };

// It typesets labels through the queue of MathJax 2; the pages have MathJax 3. The bundle starts
// at "load", after this.
window.addEventListener("DOMContentLoaded", () => {
  if (window.MathJax?.startup) {
    MathJax.Hub = {
      Queue: ([, , element]) =>
        MathJax.startup.promise.then(() => MathJax.typesetPromise([element])),
    };
  }
});

// It draws sliders late, and their handles have no names for those who listen.
window.addEventListener("DOMContentLoaded", () => {
  if (!document.querySelector('script[type="application/vnd.jupyter.widget-state+json"]')) return;
  const name = (handle) => {
    const label = handle.closest(".widget-slider")?.querySelector(".widget-label");
    handle.setAttribute("aria-label", label?.textContent || "value");
  };
  const watch = () => document.querySelectorAll(".noUi-handle:not([aria-label])").forEach(name);
  new MutationObserver(watch).observe(document.body, { childList: true, subtree: true });
});
