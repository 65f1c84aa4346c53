/** Colours that people with any kind of colour vision tell apart: Okabe and Ito, 2008, without black. */

const COLOURS = [
  [86, 180, 233], // sky blue
  [230, 159, 0], // orange
  [0, 158, 115], // bluish green
  [204, 121, 167], // reddish purple
  [240, 228, 66], // yellow
  [0, 114, 178], // blue
  [213, 94, 0], // vermilion
];
// Beyond seven the same colours come again, lighter and then darker.
const SHADES = [0, 0.35, -0.3];

/** @returns {[number, number, number]} of the thing with this number, 0 to 255 */
export function colourOf(number) {
  const shade = SHADES[Math.floor(number / COLOURS.length) % SHADES.length];
  const towards = shade > 0 ? 255 : 0;
  return COLOURS[number % COLOURS.length].map((part) => Math.round(part + (towards - part) * Math.abs(shade)));
}

/** The colour as CSS writes it. */
export function cssOf([red, green, blue]) {
  return `rgb(${red} ${green} ${blue})`;
}
