#!/usr/bin/env bash
# Makes a folder the content of the branch `notebooks` of this clone's origin, as one commit on top of
# what is there: those who have pulled the branch, by nbgitpuller say, can pull it again. Where
# nothing has changed, nothing is pushed.
#
#     book/notebooks/publish.sh _build/published
set -euo pipefail
folder=$(realpath "$1")
cd "$(git rev-parse --show-toplevel)"
commit=$(git rev-parse HEAD)
work=$(mktemp -d)
trap 'git worktree remove --force "$work"' EXIT

if git fetch -q --depth 1 origin refs/heads/notebooks 2>/dev/null; then
    git worktree add -q --detach "$work" FETCH_HEAD
else
    git worktree add -q --detach "$work" HEAD
    git -C "$work" checkout -q --orphan notebooks
fi
git -C "$work" rm -rfq --ignore-unmatch .
cp -R "$folder/." "$work"
git -C "$work" add --all
if ! git -C "$work" diff --cached --quiet; then
    git -C "$work" -c user.name="github-actions[bot]" \
        -c user.email="41898282+github-actions[bot]@users.noreply.github.com" \
        commit -qm "Notebooks of ${commit:0:12}"
    git -C "$work" push -q origin HEAD:refs/heads/notebooks
fi
