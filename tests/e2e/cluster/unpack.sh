#!/bin/sh
# sh unpack.sh FROM TARGET: takes those parts of a packed cluster that lie in FROM, and unpacks below TARGET what is whole by now. To be run
# again with the next parts; exit status 3 as long as some are missing. pack.py says what comes of it.
set -eu
from=$1 target=$2
here=$(cd "$(dirname "$0")" && pwd)
hashes=$here/parts.sha256
mkdir -p "$target/parts"
target=$(cd "$target" && pwd)

plain() { # standard input, decompressed
    if command -v xz >/dev/null; then xz -dc -T0
    else python3 -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.stdin.buffer), sys.stdout.buffer, 1 << 20)'; fi
}

unpack() { # NAME: its parts, one behind the other
    case $1 in root-*) into=$target/root ;; *) into=$target/${1%.tar.xz} ;; esac
    mkdir -p "$into"
    cat "$target/parts/$1".[0-9]* | plain | tar -C "$into" -xf -
    rm "$target/parts/$1".[0-9]*
    touch "$target/parts/$1.done"
    echo "unpacked $1 into $into"
}

missing=
for name in $(sed 's/^[^ ]*  //; s/\.[0-9]*$//' "$hashes" | sort -u); do
    [ -e "$target/parts/$name.done" ] && continue
    whole=yes
    for part in $(sed -n "s/^[^ ]*  \($name\.[0-9]*\)\$/\1/p" "$hashes"); do
        if [ -e "$from/$part" ] && [ "$from" != "$target/parts" ]; then cp "$from/$part" "$target/parts/"; fi
        if ! (cd "$target/parts" && grep "  $part\$" "$hashes" | sha256sum -c --status 2>/dev/null); then
            missing="$missing $part" whole=
        fi
    done
    [ -z "$whole" ] || unpack "$name" &
done
wait
for name in $(sed 's/^[^ ]*  //; s/\.[0-9]*$//' "$hashes" | sort -u); do
    case $missing in *" $name."*) continue ;; esac
    [ -e "$target/parts/$name.done" ] || { echo "$name could not be unpacked; the reason is above" >&2; exit 1; }
done
[ -z "$missing" ] || { echo "still missing:$missing"; exit 3; }
