#!/bin/sh
# Installs the Debian packages that the build needs and the machine lacks.
set -eu
need=""
command -v g++ >/dev/null || need="$need g++"
command -v clang-format >/dev/null || need="$need clang-format"
[ -e /usr/include/catch2/catch.hpp ] || need="$need catch2"
"$PYTHON" -c 'import ensurepip' 2>/dev/null || need="$need python3-venv"
"$PYTHON" -c 'import os, sysconfig as s; exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
  need="$need python3-dev"
[ -n "$need" ] || exit 0
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
echo "Installing Debian packages:$need"
$sudo apt-get update -qq
# shellcheck disable=SC2086
$sudo apt-get install -y -qq --no-install-recommends $need
