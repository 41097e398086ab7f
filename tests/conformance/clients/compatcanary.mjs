// CompatCanary's scan, profile modern; each of its probes is told as one of our features.
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { feature, run } from './probe.mjs'

const PROBES = {
  models: ['models.list'],
  chat: ['chat.basic'],
  stream: ['chat.streaming'],
  tools: ['chat.tool_call'],
  JSON: ['chat.structured_output'],
  responses: ['responses.basic', 'responses.streaming'],
}
let scanned

const scan = (url) => {
  const command = join(process.env.CONFORMANCE_MODULES, 'node_modules/compatcanary/src/cli.js')
  const wanted = ['--profile', 'modern', '--fail-on', 'required', '--format', 'json', '--timeout', '60000']
  const done = spawnSync(process.execPath, [command, 'scan', '--base-url', url, '--model', 'hhh-auto', ...wanted])
  console.log(done.stdout.toString(), done.stderr.toString())
  return { report: JSON.parse(done.stdout), code: done.status }
}

for (const [name, ids] of Object.entries(PROBES)) {
  feature(name, (url) => {
    scanned ??= scan(url)
    for (const id of ids) {
      const probe = scanned.report.results.find((result) => result.id === id)
      if (probe?.status !== 'pass') throw new Error(`${id}: ${probe?.summary ?? 'no such probe'}`)
    }
  })
}
feature('own checks', (url) => {
  scanned ??= scan(url)
  const { report: { summary }, code } = scanned
  if (code !== 0) throw new Error(`exit code ${code} with --fail-on required: ${JSON.stringify(summary)}`)
  return `\`--profile modern --fail-on required\`: ${JSON.stringify(summary).replaceAll('"', '')}`
})

await run('compatcanary')
