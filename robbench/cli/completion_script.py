"""`robbench completion`: the script that makes a shell complete names."""

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and names in a shell.

    Example: eval "$(robbench completion bash)" in ~/.bashrc (docs/living.md: zsh, fish)
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None  # click has all three
    program = context.find_root().command
    script = found(program, {}, "robbench", "_ROBBENCH_COMPLETE")
    # `source()` would first ask the bash on this machine for its version, and the script may be for another.
    click.echo(script.source_template % script.source_vars())
