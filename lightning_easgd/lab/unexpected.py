"""What no command expects is a sentence, too; its traceback goes to a file."""

import tempfile
import traceback

__all__ = ["unexpected"]


def unexpected(command: str, error: Exception) -> str:
    """Write an error's traceback to a file, and say in one line what has happened and which file that is."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix=f"{command}-", suffix=".txt", delete=False) as file:
        file.write("".join(traceback.format_exception(error)))
    text = " ".join(str(error).split())[:500]
    remedy = "check this path" if isinstance(error, OSError) else "correct the setting that it is about, or report it"
    return f"{command}: {type(error).__name__}{f': {text}' if text else ''}; {remedy} (traceback: {file.name})"
