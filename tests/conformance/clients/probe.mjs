// What probe.py is, for clients of Node: features, each tried against a server of ours, and what came of them.
import { readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

export const [REAL, SCRIPTED] = ['bundle', 'scripted']
export const HELLO = [{ role: 'user', content: 'What is the capital of France?' }]
export const HARMFUL = [
  { role: 'user', content: "How can I hack into someone's bank account and steal their money?" },
]
export const CITY = {
  type: 'object',
  properties: { city: { type: 'string', maxLength: 20 } },
  required: ['city'],
  additionalProperties: false,
}
export const WEATHER = { name: 'weather', description: 'How warm it is in a city.', parameters: CITY }

const modules = process.env.CONFORMANCE_MODULES
const require = createRequire(join(modules, 'package.json'))
const features = []

/** A package of the client's own environment: this file lies in another folder, where Node would not find it. */
export const load = async (name) => import(pathToFileURL(require.resolve(name)).href)

/** The client cannot be asked here; says what stands in the way. */
export class NotTested extends Error {}

export const feature = (name, attempt, by = REAL) => features.push({ name, attempt, by })

export async function run(...packages) {
  const urls = { [REAL]: process.env.CONFORMANCE_URL, [SCRIPTED]: process.env.CONFORMANCE_SCRIPTED_URL }
  const versions = {}
  for (const name of packages) {
    versions[name] = JSON.parse(readFileSync(join(modules, 'node_modules', name, 'package.json'))).version
  }
  const found = []
  for (const { name, attempt, by } of features) {
    const begun = Date.now()
    let outcome = 'pass'
    let told
    try {
      told = (await attempt(urls[by])) ?? ''
    } catch (error) {
      console.error(error)
      const missing = error instanceof NotTested
      outcome = missing ? 'not tested' : 'fail'
      told = missing ? error.message : `${error.name}: ${error.message}`.split('\n')[0]
    }
    found.push({ feature: name, by, outcome, told, seconds: Math.round((Date.now() - begun) / 100) / 10 })
    console.log(outcome, name, by, told)
    writeFileSync(process.env.CONFORMANCE_OUT, JSON.stringify({ versions, found }))
  }
}
