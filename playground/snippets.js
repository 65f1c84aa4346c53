/** The call as code that can be run as it is. The key is never in it: it is read from the environment. */

/**
 * @param {"curl"|"python"|"typescript"} language
 * @param {object} call
 * @param {string} call.url of the route
 * @param {object} call.body without `task_id`
 * @param {string} call.taskId for where none can be made on the spot
 * @param {boolean} call.needsKey
 */
export function snippet(language, call) {
  return { curl, python, typescript }[language](call);
}

function curl({ url, body, taskId, needsKey }) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  return [
    "# every new question needs a new task_id",
    `curl ${quoted(url)} \\`,
    ...(needsKey ? ['  -H "X-API-Key: $API_SECRET_KEY" \\'] : []),
    "  -H 'Content-Type: application/json' \\",
    `  -d ${quoted(inLines({ ...body, task_id: taskId }, ""))}`,
  ].join("\n");
}

function python({ url, body, needsKey }) {
  const lines = inLines({ ...body, task_id: null }, "    ");
  return [
    ...(needsKey ? ["import os"] : []),
    "import uuid",
    "",
    "import httpx",
    "",
    "answer = httpx.post(",
    `    ${JSON.stringify(url)},`,
    ...(needsKey ? ['    headers={"X-API-Key": os.environ["API_SECRET_KEY"]},'] : []),
    `    json=${lines.replace('"task_id": null', '"task_id": str(uuid.uuid4())')},`,
    "    timeout=70,",
    ")",
    "answer.raise_for_status()",
    'for instance in answer.json()["instances"]:',
    '    print(instance["score"], instance["box_xyxy_px"])',
  ].join("\n");
}

function typescript({ url, body, needsKey }) {
  const lines = inLines({ ...body, task_id: null }, "  ");
  const key = needsKey ? ', "X-API-Key": `${process.env.API_SECRET_KEY}`' : "";
  return [
    `const response = await fetch(${JSON.stringify(url)}, {`,
    '  method: "POST",',
    `  headers: { "Content-Type": "application/json"${key} },`,
    `  body: JSON.stringify(${lines.replace('"task_id": null', '"task_id": crypto.randomUUID()')}),`,
    "});",
    "const answer = await response.json();",
    "if (!response.ok) throw new Error(answer.error.message);",
    "for (const { score, box_xyxy_px } of answer.instances) console.log(score, box_xyxy_px);",
  ].join("\n");
}

/** JSON with a line for each field, and what is in a field on that line. All of it is Python, too. */
function inLines(value, indent) {
  const fields = Object.entries(value).map(([name, field]) => `${indent}  ${JSON.stringify(name)}: ${inOneLine(field)}`);
  return `{\n${fields.join(",\n")}\n${indent}}`;
}

function inOneLine(value) {
  if (Array.isArray(value)) return `[${value.map(inOneLine).join(", ")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const fields = Object.entries(value).map(([name, field]) => `${JSON.stringify(name)}: ${inOneLine(field)}`);
  return `{${fields.join(", ")}}`;
}
