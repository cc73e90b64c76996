"""Takes the pictures of a report in docs/pictures: a desktop's window in its light form, a phone's in its dark one.

The page is that of any run, such as `make demo` leaves; `make browser` brings the browser:

    python docs/make_screenshots.py runs/demo/report.html
"""

import argparse
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parent / "pictures"
CHROMIUM = Path(__file__).parents[1] / ".browser" / "chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--headless=shell"]
WINDOWS = {"report-desktop": (1280, 900, "light"), "report-phone": (390, 844, "dark")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--chromium", type=Path, default=CHROMIUM)
    args = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)
        for name, (width, height, scheme) in WINDOWS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(args.report.resolve().as_uri())
            page.screenshot(path=PICTURES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
