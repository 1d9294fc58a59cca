# shellcheck shell=sh
# For login shells in the container: Ray runs every command in one. /etc/profile has just set PATH.
export PATH="/opt/venv/bin:$PATH"
# CANN's scripts are written for bash.
if [ -n "${BASH_VERSION:-}" ]; then
    for script in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
        [ -f "$script" ] && . "$script"
    done
fi
