#!/usr/bin/env bash
# Fetches the scripts that pages need into book/_static/vendor, so that the built site works with
# no network: MathJax for formulas, Jupyter's html-manager for widgets. And axe, with which the site's
# tests look for what shuts people out, into tests/site/vendor. Needs npm; run it to move to other
# versions, and commit what it leaves. A built page asks for nothing outside the site.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/_static/vendor"

MATHJAX=3.2.2
WIDGETS=1.0.15
AXE=4.14.1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && npm pack --silent "mathjax@$MATHJAX" "@jupyter-widgets/html-manager@$WIDGETS" \
    "axe-core@$AXE" >/dev/null)
for archive in "$work"/*.tgz; do
    mkdir "${archive%.tgz}" && tar xzf "$archive" -C "${archive%.tgz}" --strip-components 1
done

# MathJax: TeX in, HTML out, its fonts, and the extensions that a formula may call for.
rm -rf mathjax && mkdir -p mathjax/input/tex mathjax/output/chtml/fonts
package=$work/mathjax-$MATHJAX
cp "$package/LICENSE" "$package/es5/tex-chtml.js" mathjax/
cp -r "$package/es5/input/tex/extensions" mathjax/input/tex/
rm mathjax/input/tex/extensions/all-packages.js
cp -r "$package/es5/output/chtml/fonts/woff-v2" mathjax/output/chtml/fonts/

# Widgets: the bundle with ipywidgets' own controls, and the icon fonts that it loads. The package
# has no licence file: widgets/LICENSE is the one of its sources, and stays.
rm -f widgets/embed.js* widgets/*.woff2
package=$work/jupyter-widgets-html-manager-$WIDGETS
grep -v '^//# sourceMappingURL' "$package/dist/embed.js" >widgets/embed.js
cp "$package/dist/embed.js.LICENSE.txt" "$package"/dist/*.woff2 widgets/

# Axe: for tests only.
axe=../../../tests/site/vendor
rm -rf "$axe" && mkdir -p "$axe"
cp "$work/axe-core-$AXE/LICENSE" "$work/axe-core-$AXE/axe.min.js" "$axe/"

find mathjax widgets "$axe" -type f -exec chmod 644 {} +
