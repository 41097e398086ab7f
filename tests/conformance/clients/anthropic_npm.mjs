// Anthropic's client for Node.
import assert from 'node:assert/strict'
import { HARMFUL, HELLO, CITY, SCRIPTED, feature, load, run } from './probe.mjs'

const { default: Anthropic } = await load('@anthropic-ai/sdk')
const model = 'hhh-auto'
const tools = [{ name: 'weather', description: 'How warm it is in a city.', input_schema: CITY }]
const client = (url) => new Anthropic({ baseURL: url.replace(/\/v1$/, ''), apiKey: 'unused', maxRetries: 0 })
const asked = (more = {}) => ({ model, max_tokens: 24, messages: HELLO, ...more })

feature('chat', async (url) => {
  assert.match((await client(url).messages.create(asked())).content[0].text, /Paris/)
})
feature('stream', async (url) => {
  const last = await client(url).messages.stream(asked()).finalMessage()
  assert.match(last.content[0].text, /Paris/)
  assert.ok(last.usage.output_tokens > 0)
})
feature('tools', async (url) => {
  const tool_choice = { type: 'any' }
  const reply = await client(url).messages.create(asked({ tools, tool_choice, max_tokens: 100 }))
  const used = reply.content.find((b) => b.type === 'tool_use')
  assert.deepEqual(Object.keys(used.input), ['city'])
})
feature('agent loop', async (url) => {
  const called = await client(url).messages.stream(asked({ tools, max_tokens: 100 })).finalMessage()
  const used = called.content.find((b) => b.type === 'tool_use')
  const result = { type: 'tool_result', tool_use_id: used.id, content: '12 degrees' }
  const messages = [...HELLO, { role: 'assistant', content: called.content }, { role: 'user', content: [result] }]
  assert.equal((await client(url).messages.create(asked({ tools, messages }))).content[0].text, 'It is mild.')
}, SCRIPTED)
feature('refusal', async (url) => {
  assert.equal((await client(url).messages.create(asked({ messages: HARMFUL }))).stop_reason, 'refusal')
})
feature('errors', async (url) => {
  await assert.rejects(client(url).messages.create(asked({ model: 'nonesuch' })), Anthropic.NotFoundError)
  await assert.rejects(client(url).messages.create(asked({ max_tokens: 0 })), Anthropic.BadRequestError)
})
feature('`hhh`', async (url) => {
  const { data, response } = await client(url).messages.create(asked()).withResponse()
  assert.equal(response.headers.get('x-hhh-request-id'), data.hhh.request_id)
})
feature('messages', async (url) => {
  const counted = await client(url).messages.countTokens({ model, messages: HELLO })
  assert.equal((await client(url).messages.create(asked())).usage.input_tokens, counted.input_tokens)
})

await run('@anthropic-ai/sdk')
