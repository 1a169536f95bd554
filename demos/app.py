"""The workbench: one page to compare, search, score, and collect preferences.

`visalign demo` or `python demos/app.py`. It opens on the shapes world, with nothing to download; any diffusers model,
LoRA and reward goes by flags.
"""

import argparse
import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence

from visalign.demos.settings import MAX_UPLOAD, Settings, add_options, read_settings

TITLE = "visalign workbench"


def build(settings: Settings):
    """The page, as `gradio.Blocks`; loads the model.

    Raises:
        ValueError: a model, LoRA or reward that is not there.
    """
    import gradio as gr

    from visalign.demos.page import Page
    from visalign.demos.tabs.compare import compare_tab
    from visalign.demos.tabs.prefer import prefer_tab
    from visalign.demos.tabs.runs import runs_tab
    from visalign.demos.tabs.score import score_tab
    from visalign.demos.tabs.search import search_tab

    from .model_session import ModelSession

    page = Page(settings, ModelSession(settings))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        gr.HTML(f"<h1>{TITLE}</h1>")
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                compare_tab(page, blocks)
            with gr.Tab("Prefer", id="prefer") as opened:
                prefer_tab(page, opened)
            with gr.Tab("Score", id="score"):
                score_tab(page)
            with gr.Tab("Search", id="search"):
                search_tab(page)
            with gr.Tab("Runs", id="runs") as opened:
                runs_tab(page, opened)

        def leave(request: gr.Request) -> None:
            page.jobs.forget(request.session_hash or "")

        blocks.unload(leave)
    return blocks


def launch(settings: Settings, wait: bool = True):
    """Open the page and serve it; returns the blocks once it is up if not to `wait`."""
    import gradio as gr

    from . import markup
    from .tabs import prefer as prefer_tab
    from .tabs import score as score_tab
    from .tabs import search_view

    blocks = build(settings)
    blocks.queue(max_size=64)
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    readable = dict(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
    readable |= dict(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    blocks.launch(
        server_name=settings.host,
        server_port=settings.port or None,
        share=settings.share,
        auth=(settings.user, settings.password) if settings.user and settings.password else None,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        max_file_size=MAX_UPLOAD,
        allowed_paths=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme.set(**readable),
        css=markup.CSS + search_view.CSS,
        head=f"<script>{prefer_tab.KEYS}{score_tab.PASTE}</script>",
    )
    print(f"the workbench is at {blocks.local_url}", flush=True)
    if blocks.share_url:
        print(f"for others: {blocks.share_url}", flush=True)
    if wait:
        blocks.block_thread()
    return blocks


def prepare_environment() -> None:
    """Before gradio is imported: nothing is reported home, and copies for download have a folder of their own."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="visalign-demo-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def demo(arguments: argparse.Namespace) -> None:
    """Run the workbench until Ctrl-C.

    Raises:
        ValueError: options that cannot work, or gradio is not installed.
    """
    settings = read_settings(arguments)
    prepare_environment()
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}; the workbench needs the packages of pip install 'visalign[demo]'") from None
    launch(settings)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `python demos/app.py`."""
    parser = argparse.ArgumentParser(prog="demos/app.py", description=TITLE)
    add_options(parser)
    try:
        demo(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"demo: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
