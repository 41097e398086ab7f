// OpenAI's client for Node.
import assert from 'node:assert/strict'
import { HARMFUL, HELLO, CITY, SCRIPTED, WEATHER, feature, load, run } from './probe.mjs'

const { default: OpenAI } = await load('openai')
const model = 'hhh-auto'
const tools = [{ type: 'function', function: WEATHER }]
const client = (baseURL) => new OpenAI({ baseURL, apiKey: 'unused', maxRetries: 0 })
const asked = (more = {}) => ({ model, messages: HELLO, max_tokens: 24, ...more })

feature('chat', async (url) => {
  const reply = await client(url).chat.completions.create(asked())
  assert.match(reply.choices[0].message.content, /Paris/)
})
feature('stream', async (url) => {
  const stream = client(url).chat.completions.stream(asked({ stream_options: { include_usage: true } }))
  const last = await stream.finalChatCompletion()
  assert.match(last.choices[0].message.content, /Paris/)
  assert.ok((await stream.totalUsage()).completion_tokens > 0)
})
feature('tools', async (url) => {
  const reply = await client(url).chat.completions.create(asked({ tools, tool_choice: 'required', max_tokens: 100 }))
  const [call] = reply.choices[0].message.tool_calls
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ['city'])
})
feature('agent loop', async (url) => {
  const asking = []
  const weather = { ...WEATHER, parse: JSON.parse, function: ({ city }) => asking.push(city) && '12 degrees' }
  const runner = client(url).chat.completions.runTools(asked({ tools: [{ type: 'function', function: weather }] }))
  assert.equal(await runner.finalContent(), 'It is mild.')
  assert.deepEqual(asking, ['Oslo'])
}, SCRIPTED)
feature('JSON', async (url) => {
  const response_format = { type: 'json_schema', json_schema: { name: 'city', schema: CITY, strict: true } }
  const reply = await client(url).chat.completions.parse(asked({ response_format, max_tokens: 60 }))
  assert.deepEqual(Object.keys(reply.choices[0].message.parsed), ['city'])
})
feature('logprobs', async (url) => {
  const { choices: [choice] } = await client(url).chat.completions.create(asked({ logprobs: true, top_logprobs: 2 }))
  assert.equal(choice.logprobs.content.map((t) => t.token).join(''), choice.message.content)
})
feature('`n`', async (url) => {
  const reply = await client(url).chat.completions.create(asked({ n: 2 }))
  assert.deepEqual(reply.choices.map((c) => c.index), [0, 1])
})
feature('refusal', async (url) => {
  const reply = await client(url).chat.completions.create(asked({ messages: HARMFUL }))
  assert.equal(reply.choices[0].finish_reason, 'content_filter')
})
feature('errors', async (url) => {
  const { chat } = client(url)
  await assert.rejects(chat.completions.create(asked({ model: 'gpt-4o' })), OpenAI.NotFoundError)
  await assert.rejects(chat.completions.create(asked({ temperature: -1 })), OpenAI.BadRequestError)
})
feature('`hhh`', async (url) => {
  const { data, response } = await client(url).chat.completions.create(asked()).withResponse()
  assert.equal(response.headers.get('x-hhh-request-id'), data.hhh.request_id)
})
feature('responses', async (url) => {
  const first = await client(url).responses.create({ model, input: HELLO[0].content, max_output_tokens: 24 })
  assert.match(first.output_text, /Paris/)
  const stream = client(url).responses.stream({ model, input: HELLO[0].content, max_output_tokens: 24 })
  assert.equal((await stream.finalResponse()).output_text, first.output_text)
})
feature('completions', async (url) => {
  const told = await client(url).completions.create({ model, prompt: 'a b', max_tokens: 1, logprobs: 1, echo: true })
  assert.equal(told.choices[0].logprobs.tokens.join(''), told.choices[0].text)
})
feature('moderations', async (url) => {
  const found = await client(url).moderations.create({ model, input: [HELLO[0].content, HARMFUL[0].content] })
  assert.deepEqual(found.results.map((r) => r.flagged), [false, true])
})
feature('models', async (url) => {
  const { data } = await client(url).models.list()
  assert.ok(data.some((m) => m.id === model))
})

await run('openai')
