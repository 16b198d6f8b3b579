#!/bin/sh
# Installs the Debian packages that the build needs and the machine lacks, and those named as
# arguments: clang-format, catch2.
set -eu
need=""
command -v g++ >/dev/null || need="$need g++"
"$PYTHON" -c 'import ensurepip' 2>/dev/null || need="$need python3-venv"
"$PYTHON" -c 'import os, sysconfig as s; exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
  need="$need python3-dev"
for package in "$@"; do
  case $package in
    clang-format) command -v clang-format >/dev/null || need="$need clang-format" ;;
    catch2) [ -e /usr/include/catch2/catch.hpp ] || need="$need catch2" ;;
    *) echo "$0: unknown package $package" >&2; exit 2 ;;
  esac
done
[ -n "$need" ] || exit 0
sudo=""
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "As root: apt-get install$need" >&2; exit 1; }
  sudo=sudo
fi
echo "Installing Debian packages:$need"
$sudo apt-get update -qq
# shellcheck disable=SC2086
$sudo apt-get install -y -qq --no-install-recommends $need
