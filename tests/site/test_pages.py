"""What a reader sees of every page, in the system's browser: it loads, moves, fits, reads aloud."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.site
AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text(encoding="utf-8")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}

# A clip plays on when its time is another one than it was.
PLAYS = """async clip => {
  clip.scrollIntoView({block: 'center'});
  const until = Date.now() + 8000, pause = () => new Promise(done => setTimeout(done, 40));
  while (!(clip.currentTime > 0) && Date.now() < until) await pause();
  const before = clip.currentTime;
  while (clip.currentTime === before && Date.now() < until) await pause();
  return before > 0 && clip.currentTime !== before && clip.videoWidth > 0;
}"""

# What stands out of the window, but for what its box scrolls, clips or hides.
TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width) found.push('the page itself');
  const held = one => {
    for (let box = one; box && box !== document.body; box = box.parentElement) {
      const style = getComputedStyle(box);
      if (style.position === 'fixed') return true;
      const inside = box !== one && box.getBoundingClientRect().right <= width + 1;
      if (style.overflowX !== 'visible' && inside) return true;
    }
    return false;
  };
  for (const one of document.querySelectorAll('main *')) {
    const {left, right, width: own} = one.getBoundingClientRect();
    if (own > 0 && (right > width + 1 || left < -1) && !held(one)) found.push(
      `<${one.tagName.toLowerCase()} class="${one.className}"> ${Math.round(left)} to ` +
      `${Math.round(right)}: ${one.textContent.trim().slice(0, 40)}`);
  }
  return found;
}"""

# What the page's widgets show beside the slider of a handle.
BESIDE = """handle => {
  const slider = handle.closest('.widget-slider');
  slider.dataset.own = '';
  const views = [...document.querySelectorAll('.widget-subarea')];
  const copies = views.map(view => view.cloneNode(true));
  delete slider.dataset.own;
  copies.forEach(copy => copy.querySelector('[data-own]')?.remove());
  return copies.map(copy => copy.innerHTML).join();
}"""

# Formulas are many, and of the text's colour: they are left out where only colours are asked for.
SERIOUS = """async rules => {
  const options = {resultTypes: ['violations'], ...(rules && {runOnly: rules})};
  const {violations} = await axe.run(rules ? {exclude: ['mjx-container']} : document, options);
  return violations.filter(one => ['serious', 'critical'].includes(one.impact)).flatMap(
    one => one.nodes.map(node => `${one.id}: ${node.target.join(' ')}: ${node.failureSummary}`));
}"""


def test_it_loads(page):
    assert page.answer.status == 200
    assert page.window.title()
    seen = "() => [...document.querySelectorAll('h1')].filter(one => one.offsetParent).length"
    assert page.run(seen) == 1
    assert page.errors == []
    assert page.failed == []


def test_no_request_leaves_the_machine(page):
    assert page.outside == []


def test_every_video_plays(page):
    still = [clip.get_attribute("src") for clip in page.all("video") if not clip.evaluate(PLAYS)]
    assert still == []


def test_every_picture_is_there(page):
    broken = """() => [...document.images].filter(image => {
      image.loading = 'eager';
      return !image.closest('[hidden]') && image.complete && image.naturalWidth === 0;
    }).map(image => image.src)"""
    page.run(broken)  # those that wait to be seen begin to load
    page.window.wait_for_load_state("networkidle")
    assert page.run(broken) == []


def test_pictures_to_step_through_move(page):
    for box in page.all(".step-through"):
        shown = "box => box.querySelector('.step:not([hidden]) img').src"
        steps = len(box.query_selector_all(".step"))
        slider, output = box.query_selector("input"), box.query_selector("output")
        first = box.evaluate(shown)
        slider.press("ArrowRight")
        assert output.text_content() == f"2 / {steps}"
        slider.press("ArrowLeft")
        button = box.query_selector("button")
        button.click()
        page.window.wait_for_function("([box, n]) => box.value !== n", arg=[output, f"1 / {steps}"])
        button.click()  # stops
        seen = {first}
        for _ in range(steps):
            slider.press("ArrowRight")
            seen.add(box.evaluate(shown))
        assert len(seen) > 1, "all pictures are the same"


def test_widgets_move(page):
    """Each slider changes what widgets show beside it."""
    views = page.all(".widget-subarea")
    assert bool(views) == bool(page.all('script[type="application/vnd.jupyter.widget-state+json"]'))
    for view in views:
        page.window.wait_for_function("one => one.offsetHeight > 10", arg=view)
        for handle in view.query_selector_all(".noUi-handle"):
            seen = {handle.evaluate(BESIDE)}
            for key in ("ArrowLeft", "ArrowRight", "ArrowRight"):  # from either end
                handle.press(key)
                seen.add(handle.evaluate(BESIDE))
            assert len(seen) > 1, "nothing but the slider moves"


def test_nothing_is_wider_than_a_phone(page):
    page.window.set_viewport_size(PHONE)
    try:
        page.window.wait_for_timeout(100)
        assert page.run(TOO_WIDE) == []
    finally:
        page.window.set_viewport_size(DESK)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, theme):
    """In the dark theme, colours only: all else is the same."""
    page.run("theme => document.documentElement.dataset.theme = theme", theme)
    page.window.wait_for_timeout(300)  # colours fade
    page.run(AXE)
    assert page.run(SERIOUS, ["color-contrast"] if theme == "dark" else None) == []
