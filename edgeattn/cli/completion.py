"""`edgeattn completion`: what makes bash, zsh and fish complete commands, options and names."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click
from click.shell_completion import (
    BashComplete,
    FishComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

from edgeattn.cli.names import one_of
from edgeattn.cli.verb import Verb

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_EXAMPLES = """
  source <(edgeattn completion bash)
  edgeattn completion bash > ~/.local/share/bash-completion/completions/edgeattn
  edgeattn completion zsh > "${fpath[1]}/_edgeattn"
  edgeattn completion fish > ~/.config/fish/completions/edgeattn.fish
"""
_SHELLS = ("bash", "zsh", "fish")

# Where a shell's script asks the program, as click names it.
_VARIABLE = "_EDGEATTN_COMPLETE"

_BASH = """\
%(complete_func)s() {
    local kind value
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            plain)
                COMPREPLY+=("$value")
                # more follows behind these: no blank
                [[ $value == *[=@:] ]] && compopt -o nospace
                ;;
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
        esac
    done < <(COMP_LINE=$COMP_LINE COMP_POINT=$COMP_POINT COMP_WORDBREAKS=$COMP_WORDBREAKS \\
        %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

# As click's, but that --option= stays in front of the answers, and that no blank follows what is
# unfinished.
_ZSH = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local kind value help done=1
    local -a response whole unfinished described
    (( ! $+commands[%(prog_name)s] )) && return 1
    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
        %(complete_var)s=zsh_complete %(prog_name)s)}")
    compset -P 1 '--*='
    for kind value help in ${response}; do
        case $kind in
            plain)
                if [[ $value == *[=@:] ]]; then
                    unfinished+=("${value//\\:/:}")
                elif [[ $help == _ ]]; then
                    whole+=("$value")
                else
                    described+=("$value:$help")
                fi
                ;;
            dir) _path_files -/ && done=0 ;;
            file) _path_files -f && done=0 ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described && done=0
    (( $#whole )) && compadd -V unsorted -a whole && done=0
    (( $#unfinished )) && compadd -V unsorted -S '' -a unfinished && done=0
    return done
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

# As click's, but that --option= stays in front of the answers, and that these may hold commas.
_FISH = """\
function %(complete_func)s
    set -l option (string match --regex -- '^--[^=]+=' (commandline -t))
    set -l response (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) \
        COMP_CWORD=(commandline -t) %(prog_name)s)
    for answer in $response
        set -l parts (string split --max 1 , $answer)
        switch $parts[1]
            case plain
                echo "$option$parts[2]"
            case dir
                __fish_complete_directories $parts[2] | string replace --regex -- '^' "$option"
            case file
                __fish_complete_path $parts[2] | string replace --regex -- '^' "$option"
        end
    end
end

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


class _Bash(BashComplete):
    """Bash breaks words at `@`, `:` and `=`, where names of targets and schemes go on.

    So the line itself is split at blanks, and what bash takes for earlier words is cut off the
    answers.
    """

    source_template = _BASH

    @staticmethod
    def _check_version() -> None:
        """Leaves out click's: it starts a bash, for a script that is printed for any machine."""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
        words = split_arg_string(line)
        incomplete = words.pop() if words and not line[-1].isspace() else ""
        self._answered = _last_break(incomplete)
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem[str]) -> str:
        value = item.value[self._answered :] if item.type == "plain" else item.value
        return f"{item.type},{value}"


def _last_break(word: str) -> int:
    """How much of an answer to a word bash takes for words before it."""
    if word.startswith("--"):
        word = word.partition("=")[2]  # --target=NAME is answered with names alone
    breaks = os.environ.get("COMP_WORDBREAKS", "@:=")
    # An @ stays with what follows it, as readline's special prefixes do.
    ends = [word.rfind(one) + (one != "@") for one in "@:=" if one in breaks]
    return max([0, *ends])


class _Zsh(ZshComplete):
    """With our script."""

    source_template = _ZSH


class _Fish(FishComplete):
    """With our script."""

    source_template = _FISH


for _shell in (_Bash, _Zsh, _Fish):
    add_completion_class(_shell)


@click.command(
    "completion",
    cls=Verb,
    examples=_EXAMPLES,
    reads="nothing",
    writes="the script to standard output",
)
@click.argument("shell", metavar="|".join(_SHELLS), type=one_of(*_SHELLS))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@click.pass_context
def command(context: click.Context, shell: str, as_json: bool) -> None:
    """Print what makes a shell complete commands, options, targets, schemes and variants.

    Run it in the current shell, or put it where your shell looks for completions.
    """
    kind = get_completion_class(shell) if shell in _SHELLS else None
    if kind is None:
        from edgeattn.errors import unknown_name

        raise unknown_name("shell", shell, _SHELLS)
    root = context.find_root()
    script = kind(root.command, {}, "edgeattn", _VARIABLE).source()
    click.echo(json.dumps({"shell": shell, "script": script}) if as_json else script, nl=as_json)
