// Vercel's AI SDK with its provider for OpenAI-compatible servers.
import assert from 'node:assert/strict'
import { HARMFUL, HELLO, CITY, SCRIPTED, feature, load, run } from './probe.mjs'

const { APICallError, Output, generateText, isStepCount, stepCountIs, streamText, tool, jsonSchema } = await load('ai')
const { createOpenAICompatible } = await load('@ai-sdk/openai-compatible')
const options = { apiKey: 'unused', supportsStructuredOutputs: true, includeUsage: true }
const model = (url, id = 'hhh-auto') => createOpenAICompatible({ name: 'hhh', baseURL: url, ...options })(id)
const prompt = HELLO[0].content
const asked = (url, more = {}) => ({ model: model(url), prompt, maxOutputTokens: 24, maxRetries: 0, ...more })
const steps = stepCountIs ?? isStepCount

feature('chat', async (url) => {
  const { text, usage } = await generateText(asked(url))
  assert.match(text, /Paris/)
  assert.ok(usage.outputTokens > 0)
})
feature('stream', async (url) => {
  const { textStream, usage, finishReason } = streamText(asked(url))
  let text = ''
  for await (const piece of textStream) text += piece
  assert.match(text, /Paris/)
  assert.ok((await usage).outputTokens > 0)
  assert.equal(await finishReason, 'stop')
})
const weather = (asking) => tool({
  description: 'How warm it is in a city.',
  inputSchema: jsonSchema(CITY),
  execute: async ({ city }) => asking.push(city) && '12 degrees',
})
feature('tools', async (url) => {
  const asking = []
  await generateText(asked(url, { tools: { weather: weather(asking) }, toolChoice: 'required', maxOutputTokens: 100 }))
  assert.equal(asking.length, 1)
})
feature('agent loop', async (url) => {
  for (const ask of [generateText, streamText]) {
    const asking = []
    const result = await ask(asked(url, { tools: { weather: weather(asking) }, stopWhen: steps(3) }))
    assert.equal(await result.text, 'It is mild.')
    assert.deepEqual(asking, ['Oslo'])
  }
}, SCRIPTED)
feature('JSON', async (url) => {
  const { output } = await generateText(asked(url, { output: Output.object({ schema: jsonSchema(CITY) }), maxOutputTokens: 60 }))
  assert.deepEqual(Object.keys(output), ['city'])
})
feature('refusal', async (url) => {
  const { finishReason } = await generateText(asked(url, { prompt: HARMFUL[0].content }))
  assert.equal(finishReason, 'content-filter')
})
feature('errors', async (url) => {
  await assert.rejects(
    generateText(asked(url, { model: model(url, 'gpt-4o') })),
    (error) => APICallError.isInstance(error) && error.statusCode === 404,
  )
})
feature('`hhh`', async (url) => {
  const { response } = await generateText(asked(url))
  assert.ok(response.headers['x-hhh-weights'].startsWith('base='))
  return 'in the headers (`response.headers`)'
})

await run('ai', '@ai-sdk/openai-compatible')
