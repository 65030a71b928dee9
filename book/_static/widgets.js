// Two things that the widgets' bundle expects of a page and the theme does not give it.

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
