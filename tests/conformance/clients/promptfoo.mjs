// promptfoo: our decision as its `guardrails` assertion, through its own OpenAI provider and through a response transform.
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { HARMFUL, HELLO, feature, run } from './probe.mjs'

const folder = join(dirname(process.env.CONFORMANCE_OUT), 'promptfoo')
const root = join(process.env.CONFORMANCE_MODULES, 'node_modules/promptfoo')
const STOPS = ['refuse', 'block', 'escalate']
const transform = `({
  output: json.choices[0].message.content,
  guardrails: { flagged: json.hhh.decisions.some((d) => ${JSON.stringify(STOPS)}.includes(d.action)) },
})`

function evaluate(name, provider, tests) {
  mkdirSync(folder, { recursive: true })
  const [config, out] = [join(folder, `${name}.json`), join(folder, `${name}.out.json`)]
  writeFileSync(config, JSON.stringify({ prompts: ['{{ask}}'], providers: [provider], tests }))
  const offline = {
    PROMPTFOO_DISABLE_TELEMETRY: '1',
    PROMPTFOO_DISABLE_UPDATE: '1',
    PROMPTFOO_DISABLE_REMOTE_GENERATION: '1',
    PROMPTFOO_CONFIG_DIR: folder,
    OPENAI_API_KEY: 'unused',
  }
  const command = [join(root, 'dist/src/entrypoint.js'), 'eval', '-c', config, '-o', out, '--no-cache', '--no-table']
  const done = spawnSync(process.execPath, command, { env: { ...process.env, ...offline }, timeout: 120_000 })
  console.log(done.stdout?.toString().slice(-3000), done.stderr?.toString().slice(-3000))
  return JSON.parse(readFileSync(out)).results.results
}

const tests = [
  { vars: { ask: HELLO[0].content }, assert: [{ type: 'contains', value: 'Paris' }, { type: 'guardrails' }] },
  { vars: { ask: HARMFUL[0].content }, assert: [{ type: 'guardrails' }] },
]

function judged(results) {
  assert.deepEqual(results.map((r) => r.success), [true, false], JSON.stringify(results.map((r) => r.gradingResult?.reason)))
}

feature('own checks', (url) => {
  const body = { model: 'hhh-auto', max_tokens: 24, messages: [{ role: 'user', content: '{{prompt}}' }] }
  const config = { url: `${url}/chat/completions`, method: 'POST', body, transformResponse: transform }
  judged(evaluate('http', { id: 'http', config: { ...config, headers: { 'content-type': 'application/json' } } }, tests))
  return '`guardrails` with a response transform from `hhh.decisions`'
})
feature('refusal', (url) => {
  judged(evaluate('openai', { id: 'openai:chat:hhh-auto', config: { apiBaseUrl: url, max_tokens: 24 } }, tests))
  return '`guardrails` by `openai:chat`, from `finish_reason`'
})
feature('decisions', (url) => {
  const { version } = JSON.parse(readFileSync(join(root, 'package.json')))
  const known = spawnSync('grep', ['-rlqs', 'openai:decisions', join(root, 'dist')]).status === 0
  const rule = 'The reply names a city.'
  const questions = [{ type: 'predicate', name: 'rubric', instructions: rule }]
  const http = {
    id: 'http',
    config: {
      url: `${url}/decisions`,
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: { model: 'hhh-auto', input: '{{prompt}}', questions },
      transformResponse: `JSON.stringify({
        score: json.answers[0].probability, pass: json.answers[0].probability >= 0, reason: 'told by /v1/decisions',
      })`,
    },
  }
  const grader = known ? { id: 'openai:decisions:hhh-auto', config: { apiBaseUrl: url } } : http
  const rubric = { type: 'llm-rubric', value: rule, provider: grader, ...(known ? {} : { rubricPrompt: 'Reply: {{output}}' }) }
  const [result] = evaluate(
    'decisions',
    { id: 'openai:chat:hhh-auto', config: { apiBaseUrl: url, max_tokens: 24 } },
    [{ vars: { ask: HELLO[0].content }, assert: [rubric] }],
  )
  const score = result.gradingResult?.componentResults?.[0]?.score
  assert.ok(score > 0 && score < 1, JSON.stringify(result.gradingResult ?? result.error))
  if (!known) {
    return `\`llm-rubric\` graded by \`/v1/decisions\` over its HTTP provider: ${version}, npm's newest, has no \`openai:decisions\``
  }
})

await run('promptfoo')
