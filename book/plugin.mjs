// The book's own roles and directives for MyST's tools (mystmd, on which Jupyter Book 2 stands). Numbers come from the
// ledgers, as in lipguide/book/roles.py. The pages `api` and `results` are looked up in Python: `make book` has them.
import { readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";

const BOOK = fileURLToPath(new URL(".", import.meta.url));
const PROFILES = ["quick", "full"];
const records = new Map();

function record(name) {
  const file = PROFILES.includes(name.split(".").pop()) ? name : `${name}.quick`;
  if (!records.has(file)) records.set(file, JSON.parse(readFileSync(join(BOOK, "results", `${file}.json`), "utf8")));
  return records.get(file);
}

/** A value by its path; a name may hold dots itself, so the longest is tried first. */
function lookup(content, key) {
  if (!key) return content;
  const parts = key.split(".");
  for (let count = parts.length; count > 0; count--) {
    const name = parts.slice(0, count).join(".");
    if (content !== null && typeof content === "object" && Object.hasOwn(content, name)) {
      return lookup(content[name], parts.slice(count).join("."));
    }
  }
  throw new Error(`nothing at ${key}`);
}

/** Digits and exponent of a positive number, rounded as Python does: a tie goes to the even digit. */
function rounded(written, more) {
  const [digits, exponent] = more.split("e");
  const kept = written.split("e")[0].replace(".", "").length;
  const all = digits.replace(".", "");
  const tie = /^50*$/.test(all.slice(kept));
  if (!tie || (Number(all[kept - 1]) % 2 === 1)) return written;
  const even = digits.slice(0, written.split("e")[0].length).replace(/\.$/, "");
  return exponent === undefined ? even : `${even}e${exponent}`;
}

const fixed = (value, places) => rounded(value.toFixed(places), value.toFixed(Math.min(places + 60, 100)));
const scientific = (value, places) => rounded(value.toExponential(places), value.toExponential(Math.min(places + 60, 100)));

function general(value, places) {
  const count = Math.max(places, 1), text = scientific(value, count - 1);
  const exponent = Number(text.split("e")[1]);
  const plain = exponent >= -4 && exponent < count;
  const digits = plain ? fixed(value, count - 1 - exponent) : text.split("e")[0];
  const short = digits.includes(".") ? digits.replace(/\.?0+$/, "") : digits;
  return plain ? short : `${short}e${exponent}`;
}

/** Python's format() for the forms that the book uses. */
function format(value, form) {
  if (form === "s") return String(value);
  const [, plus, comma, places, kind] = /^(\+?)(,?)(?:\.(\d+))?([dfeg%])$/.exec(form);
  const size = Math.abs(value), count = places === undefined ? 6 : Number(places);
  const styles = { d: () => size.toFixed(0), f: () => fixed(size, count), e: () => scientific(size, count) };
  let text = { ...styles, g: () => general(size, count), "%": () => `${fixed(100 * size, count)}%` }[kind]();
  if (comma) text = text.replace(/^\d+/, (digits) => digits.replace(/\B(?=(\d{3})+$)/g, ","));
  const sign = value < 0 || Object.is(value, -0) ? "-" : plus;
  return sign + text;
}

/** A number as people write it, as `readable` in lipguide/book/tables.py has it. */
function readable(text) {
  const found = /^([+-]?)(\d[\d,.]*)(?:e([+-]?\d+))?$/.exec(text);
  if (!found) return text;
  const [, sign, digits, power] = found;
  if (power !== undefined && Number(digits) === 0) return "0";
  const minus = sign.replace("-", "−");
  if (power === undefined) return minus + digits;
  const raised = [...String(Number(power))].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
  return Number(digits) === 1 ? `${minus}10${raised}` : `${minus}${digits}·10${raised}`;
}

/** What a ledger role says on a page. */
export function number(text, page) {
  const fields = text.split(":");
  const [chapter, key, form] = fields.length === 3 ? fields : [page, ...fields];
  const content = record(chapter);
  return readable(format(lookup(key.startsWith("provenance.") ? content : content.results, key), form));
}

const page = (file) => basename(file.path).replace(/\.(md|ipynb)$/, "");
const words = (value) => ({ type: "text", value });
const paragraph = (...children) => ({ type: "paragraph", children });

function duration(seconds) {
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

/** Which run the numbers of a chapter come from. */
function runs(file) {
  const lines = [];
  for (const profile of PROFILES) {
    try {
      const run = record(`${page(file)}.${profile}`).provenance;
      lines.push(`${profile}: ${duration(run.seconds)} on ${run.device}, ${run.start.slice(0, 10)}, commit ${run.commit}`);
    } catch {
      lines.push(`${profile}: not run on record`);
    }
  }
  return [paragraph({ type: "emphasis", children: [words(`Numbers of this chapter. ${lines.join("; ")}.`)] })];
}

/** The rows of guidelines.yml, which has one `key: value` a line. */
export function guidelines() {
  const sections = [];
  for (const line of readFileSync(join(BOOK, "guidelines.yml"), "utf8").split("\n")) {
    const [, dash, key, rest] = /^\s*(- )?(\w+):\s*(.*)$/.exec(line) ?? [];
    if (!key || line.startsWith("#") || key === "rows") continue;
    const value = rest.replace(/^(["'])(.*)\1$/, "$2");
    if (key === "section") sections.push({ section: value, rows: [] });
    else if (dash) sections.at(-1).rows.push({ [key]: value });
    else sections.at(-1).rows.at(-1)[key] = value;
  }
  return sections;
}

/** The row that a mark in a chapter names. */
function advice(key) {
  const row = guidelines().flatMap(({ rows }) => rows).find(({ mark }) => mark === key);
  if (!row) throw new Error(`no row of guidelines.yml has the mark ${key}`);
  return row;
}

/** A mark: a link to the page of the rows, as `Advice` in lipguide/book/marks.py has it. */
export function mark(key) {
  const { at, verdict, says } = advice(key);
  return { type: "link", url: "guidelines", title: says, children: [words(`guide ${at}: ${verdict}`)] };
}

function table(file, context) {
  const lines = [];
  for (const { section, rows } of guidelines()) {
    lines.push(`**${section}**`, "");
    lines.push("| § | the guide says | verdict | what a run says | chapter and call |", "|---|---|---|---|---|");
    for (const row of rows) {
      const call = row.call ? ` \`lip.${row.call}\`` : "";
      lines.push(`| ${row.at} | ${row.says} | **${row.verdict}** | ${row.found} | {doc}\`${row.chapter}\`${call} |`);
    }
    lines.push("");
  }
  return context.parseMyst(lines.join("\n")).children;
}

const elsewhere = (what) => () => [paragraph(words(`${what}: the book as \`make book\` renders it has this page.`))];
const directive = (name, run) => ({ name, body: { type: String }, run: (_, file, context) => run(file, context) });

export default {
  name: "lipguide",
  roles: [
    { name: "ledger", body: { type: String, required: true }, run: (data, file) => [words(number(data.body, page(file)))] },
    { name: "advice", body: { type: String, required: true }, run: (data) => [mark(data.body)] },
  ],
  directives: [
    directive("run-box", runs),
    directive("guidelines", table),
    directive("install", () => [{ type: "code", lang: "bash", value: "pip install -e '.[detection]'   # in the folder of the sources" }]),
    directive("api", elsewhere("Names and their docstrings")),
    directive("records", elsewhere("All runs on record")),
  ],
};
