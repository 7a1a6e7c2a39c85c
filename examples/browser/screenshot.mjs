// Opens the page in headless Chromium, completes its text, and takes a picture.
//
//     node screenshot.mjs http://127.0.0.1:8000/ page.png
//
// Needs `npm install` here and Chromium, at /usr/bin/chromium or $CHROMIUM. Prints what the page wrote, as JSON.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [url, picture] = process.argv.slice(2);
const profile = await mkdtemp(join(tmpdir(), "page-"));
const browser = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  headless: true,
  viewport: { width: 720, height: 420 },
  args: [
    "--no-sandbox", // a container's root has no sandbox; the page is our own
    ...["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"],
    ...["--disable-background-networking", "--disable-component-update"],
  ],
});
try {
  const page = await browser.newPage();
  const wrong = [];
  page.on("pageerror", (error) => wrong.push(String(error)));
  await page.goto(url);
  await page.locator("#write:enabled").click({ timeout: 60_000 });
  await page.waitForFunction(() => document.getElementById("time").textContent !== "", null, { timeout: 60_000 });
  const text = (id) => page.locator(`#${id}`).textContent();
  const [given, more, time, facts] = [await text("given"), await text("more"), await text("time"), await text("facts")];
  await page.screenshot({ path: picture });
  console.log(JSON.stringify({ given, more, time, facts, wrong }));
} finally {
  await browser.close();
  await rm(profile, { recursive: true, force: true });
}
