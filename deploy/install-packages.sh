#!/bin/sh
# Installs the Debian packages of packages.txt that are missing.
# usage: install-packages.sh [run|test]     (test: those of run as well)
set -eu
here=$(dirname "$0")
want=${1:-run}

missing=
while read -r kind package _; do
    case $kind in
    run) ;;
    test) [ "$want" = test ] || continue ;;
    *) continue ;;
    esac
    status=$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null || true)
    [ "$status" = "install ok installed" ] || missing="$missing $package"
done < "$here/packages.txt"
[ -n "$missing" ] || exit 0

give_up() {
    echo "Medley needs these packages, which could not be installed here: $1" >&2
    echo "On Debian or Ubuntu:  sudo apt-get install$missing" >&2
    echo "Elsewhere, install their equivalents and set SKIP_PACKAGES=1." >&2
    exit 1
}

command -v apt-get >/dev/null || give_up "there is no apt-get"
as_root=
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || give_up "not root, and there is no sudo"
    as_root=sudo
fi
echo "Installing:$missing"
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -qq || give_up "apt-get update failed"
# shellcheck disable=SC2086  # one word each
$as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null || give_up "apt-get install failed"
