// Clips play while they are in view, and load then. A click, Enter or the space bar stops one and
// starts it again. Who asks for less motion starts each by its controls.
window.addEventListener("DOMContentLoaded", () => {
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) target.pause();
      else if (!target.stopped) target.play().catch(() => (target.controls = true));
    }
  });
  for (const clip of document.querySelectorAll(".bd-article video")) {
    if (still) continue;
    const toggle = () => {
      clip.stopped = !clip.paused;
      clip.stopped ? clip.pause() : clip.play();
    };
    clip.controls = false;
    clip.tabIndex = 0;
    clip.addEventListener("click", toggle);
    clip.addEventListener("keydown", (event) => {
      if (event.key !== " " && event.key !== "Enter") return;
      event.preventDefault(); // the space bar would scroll
      toggle();
    });
    watch.observe(clip);
  }
  // Pictures to step through load together, once somebody reaches for them.
  for (const box of document.querySelectorAll(".step-through")) {
    const load = () => box.querySelectorAll("img").forEach((image) => (image.loading = "eager"));
    for (const touched of ["pointerover", "focusin"]) box.addEventListener(touched, load, { once: true });
  }
});
