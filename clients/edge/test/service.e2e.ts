/** The client against the real service: SERVICE_URL, API_SECRET_KEY, IMAGE_URL and TASK_IDS (of pending rows, by commas). */
import assert from "node:assert/strict";
import { it } from "node:test";
import { type Predict, SegmentClient, ServiceError } from "../src/client.js";

const { SERVICE_URL = "", API_SECRET_KEY = "", IMAGE_URL = "", USER_ID = "", TASK_IDS = "" } = process.env;
const [single = "", batch = "", handed = ""] = TASK_IDS.split(",");
const client = new SegmentClient({ baseUrl: SERVICE_URL, apiKey: API_SECRET_KEY });

function ask(task_id: string, more: Partial<Predict> = {}): Predict {
  return { image_url: IMAGE_URL, text_prompt: "red circle", user_id: USER_ID, task_id, ...more };
}

it("finds a red circle", async () => {
  const result = await client.predict(ask(single));
  assert.deepEqual(result.labels, ["red circle"]);
  assert.equal(result.task_id, single);
  assert.equal(result.instances.length, 1);
});

it("answers the same task from its record", async () => {
  const [one, other] = [await client.predict(ask(single)), await client.predict(ask(single))];
  assert.deepEqual(one.instances, other.instances);
});

it("says what is wrong with other inputs under the same id", async () => {
  const caught = await client
    .predict(ask(single, { text_prompt: "blue square" }), { requestId: "mine-2" })
    .catch((e) => e);
  assert.ok(caught instanceof ServiceError);
  assert.deepEqual([caught.status, caught.code, caught.requestId], [409, "TASK_CONFLICT", "mine-2"]);
});

it("says which field is wrong", async () => {
  const caught = await client.predict(ask("task", { user_id: "no blanks here" })).catch((e) => e);
  assert.ok(caught instanceof ServiceError);
  assert.deepEqual([caught.status, caught.details[0]?.field], [422, "user_id"]);
});

it("finds many things at once", async () => {
  const { text_prompt: _, ...rest } = ask(batch);
  const { results } = await client.predictBatch({ ...rest, prompts: ["red circle", "blue square", "blue circle"] });
  assert.deepEqual(
    results.map(({ labels }) => labels),
    [["red circle"], ["blue square"], []],
  );
});

it("hands a task over and waits for it", async () => {
  const accepted = await client.predictAsync(ask(handed));
  assert.equal(accepted.location, `/api/v1/tasks/${handed}`);
  const result = await client.waitFor(handed);
  assert.ok("labels" in result);
  assert.deepEqual(result.labels, ["red circle"]);
  const { status, attempts } = await client.task(handed);
  assert.deepEqual([status, attempts], ["done", 1]);
});

it("knows the model and how the service is", async () => {
  assert.equal((await client.modelInfo()).model_name, "SAM3");
  assert.equal((await client.health()).dependencies.journal.status, "ok");
});
