# Sourced by bootstrap.sh and criu/install.sh. A line for each step and a bar for each long one; what a step prints goes to
# .cache/log/, and its tail is shown when the step fails. Where no terminal is attached (CI) a step is two lines instead of a bar.

logs=.cache/log
mkdir -p "$logs"

fail() { # WHAT, WHAT-TO-DO
    printf '\n%s\n  %s\n' "$1" "$2" >&2
    exit 1
}

draw() { # LABEL DONE TOTAL
    local width=30 filled=0 percent=0
    if (($3 > 0)); then
        percent=$((100 * ($2 < $3 ? $2 : $3) / $3))
        filled=$((width * percent / 100))
    fi
    local full empty
    printf -v full '%*s' "$filled" ''
    printf -v empty '%*s' $((width - filled)) ''
    printf '\r\033[K  %s%s %3d %%  %s' "${full// /█}" "${empty// /░}" "$percent" "$1"
}

# step LABEL PROGRESS COMMAND…: runs the command. PROGRESS is a function that reads the log on stdin and prints "DONE TOTAL".
step() {
    local label=$1 progress=$2 began=$SECONDS log status=0
    shift 2
    log=$logs/${label//[^a-zA-Z0-9.]/-}.log
    : >"$log"
    [ -t 1 ] || printf '  %s …\n' "$label"
    "$@" >"$log" 2>&1 </dev/null &
    local child=$!
    if [ -t 1 ]; then
        while kill -0 $child 2>/dev/null; do
            # shellcheck disable=SC2046  # two numbers
            draw "$label" $("$progress" <"$log")
            sleep 0.2
        done
    fi
    wait $child || status=$?
    [ -t 1 ] && printf '\r\033[K'
    if ((status)); then
        printf '\n%s failed (exit status %d). The end of %s:\n\n' "$label" $status "$log" >&2
        tail -n 25 "$log" >&2
        exit 1
    fi
    printf '  %s: done in %d s\n' "$label" $((SECONDS - began))
}

unknown() { echo 0 0; }

# apt's status lines: dlstatus:…:PERCENT:… while it downloads, pmstatus:…:PERCENT:… while it unpacks; each is half of the bar.
apt_progress() {
    awk -F: '/^dlstatus:/ { done = $3 / 2 } /^pmstatus:/ { done = 50 + $3 / 2 } END { print int(done), 100 }'
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=300 -o APT::Status-Fd=1 "$@"
}

# need PACKAGE…: installs those of the distribution's packages that are missing.
need() {
    local package missing=()
    command -v apt-get >/dev/null || fail "apt-get is not on this machine, and something is missing that these Debian packages bring: $*" \
        "Install their like with this distribution's own tools, then run make again."
    for package; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    [ "$(id -u)" = 0 ] || fail "these packages are missing, and only root can install them: ${missing[*]}" \
        "Run: sudo apt-get update && sudo apt-get install ${missing[*]}    and then make again."
    refresh
    step "installing $(printf '%d' ${#missing[@]}) system packages: $(shorten "${missing[*]}")" apt_progress apt_install "${missing[@]}"
}

shorten() { if ((${#1} > 60)); then printf '%.57s…' "$1"; else printf '%s' "$1"; fi; }

# Once a run. A source of somebody else's that does not answer is no reason to stop: what is missing shows at the install.
refresh() {
    [ -n "${refreshed:-}" ] && return
    refreshed=yes
    step "reading the package lists" unknown sh -c 'apt-get update -o DPkg::Lock::Timeout=300 || true'
}
