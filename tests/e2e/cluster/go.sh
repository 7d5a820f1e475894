# Sourced, after deploy/steps.sh: builds programs of pinned Go modules. Whoever sources it has set, seen from the checkout,
#   modules  a folder that has a folder with go.mod and go.sum for each module
#   cache    where a Go is brought to where the machine has none that is new enough
#   bin      where the programs come to, and a key of what each module's were built of

pinned() { # MODULE-FOLDER MODULE: the version that its go.mod requires
    awk -v module="$2" '$1 == "require" && $2 == module { print $3 } $1 == module && NF > 1 && $2 ~ /^v/ { print $2 }' "$modules/$1/go.mod" | head -n 1
}

# A Go that can read these go.mod files; from 1.21 on it brings the very version that they name.
go_path() {
    if go version 2>/dev/null | grep -qE 'go1\.(2[1-9]|[3-9][0-9])'; then command -v go; else echo "$cache/go/bin/go"; fi
}

# Debugging information is left out where it would be made, and the compiler's memory is reclaimed less often: a third of its time.
compile() { # FOLDER LINKER-FLAGS TAGS NAME=PACKAGE…
    local folder=$1 flags=$2 tags=$3 go one package
    go=$(go_path)
    shift 3
    cd "$modules/$folder"
    echo "packages $("$go" list -deps -tags "$tags" "${@#*=}" | wc -l)"
    rm -rf "$bin/.$folder.new"
    GOGC=400 CGO_ENABLED=0 "$go" build -v -mod=readonly -trimpath -tags "$tags" -gcflags=all=-dwarf=false -ldflags "-s -w $flags" \
        -o "$bin/.$folder.new/" "${@#*=}"
    for one; do # Go names a program by its package: the last part of its path, a version excepted
        package=${one#*=}
        mv "$bin/.$folder.new/$(sed -E 's:/v[0-9]+$::; s:.*/::' <<<"${package/#./$folder}")" "$bin/${one%%=*}"
    done
    rmdir "$bin/.$folder.new"
}

compile_progress() { awk '$1 == "packages" { total = $2 } /^[a-z0-9.]+(\/|$)/ { done++ } END { print done + 0, total + 0 }'; }

# All programs of a module in one run of Go, which links one while it compiles the next.
build() { # FOLDER LINKER-FLAGS TAGS NAME=PACKAGE…
    local key one missing=
    key=$({ cat "$modules/$1"/*; echo "$@"; } | sha256sum | cut -c1-16)
    for one in "${@:4}"; do [ -x "$bin/${one%%=*}" ] || missing=yes; done
    [ -z "$missing" ] && [ "$(cat "$bin/.$1.key" 2>/dev/null)" = "$key" ] && return
    [ -x "$(go_path)" ] || step "fetching Go" unknown .venv/bin/python -m tests.e2e.cluster.toolchain "$cache/go"
    step "building $1, programs: $(($# - 3))" compile_progress compile "$@"
    echo "$key" >"$bin/.$1.key"
}
