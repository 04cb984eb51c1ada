"""The browser that the site's pages are opened in: Playwright's own, or one that is installed on the machine.

As a program, it says which one that is, and fails if there is none.
"""

from __future__ import annotations

import os
import shutil
import sys

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Return the path of a browser of Chromium's kind, or None."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if os.path.exists(own) else next(filter(None, map(shutil.which, NAMES)), None)


if __name__ == "__main__":
    found = find_browser()
    sys.stdout.write(f"the browser is {found}\n" if found else "no browser is installed\n")
    sys.exit(found is None)
