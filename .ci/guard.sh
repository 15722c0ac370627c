#!/bin/sh
# `platform/` is a bare source root. With an __init__.py or a platform.py in it, it shadows the standard library's
# `platform`, and Ray, NumPy and pytest die before any test could say why.
for file in platform/__init__.py platform/platform.py; do
  if [ -e "$file" ]; then
    echo "$file shadows the standard library's platform module: remove it" >&2
    exit 1
  fi
done
