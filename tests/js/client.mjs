// OpenAI's JavaScript client against a server: node client.mjs BASE_URL KEY. Prints "well" when all is.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is 4729 + 386?" }];
const asked = { model: "tiny:rl", messages, max_tokens: 10, seed: 3, temperature: 1 };

const whole = await client.chat.completions.create(asked);
let text = "";
const finishes = [];
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
  if (chunk.choices[0].finish_reason) finishes.push(chunk.choices[0].finish_reason);
}
assert.equal(text, whole.choices[0].message.content);
assert.deepEqual(finishes, [whole.choices[0].finish_reason]);

const parameters = { type: "object", properties: { city: { enum: ["Bern", "Oslo"] } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const called = await client.chat.completions.create({ ...asked, max_tokens: 80, tools, tool_choice: "required" });
const call = called.choices[0].message.tool_calls[0];
assert.ok(["Bern", "Oslo"].includes(JSON.parse(call.function.arguments).city));

const response = await client.responses.create({ model: "tiny:rl", input: "Hello", max_output_tokens: 5 });
assert.equal(typeof response.output_text, "string");
const vectors = await client.embeddings.create({ model: "tiny:rl", input: ["It is", "tool"] });
assert.equal(vectors.data.length, 2);
assert.ok(Math.abs(vectors.data[0].embedding.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-3);

await assert.rejects(client.chat.completions.create({ ...asked, model: "gpt-9" }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ ...asked, temperature: 9 }), OpenAI.BadRequestError);
await assert.rejects(new OpenAI({ baseURL, apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
console.log("well");
